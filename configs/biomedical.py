"""Biomedical text: for evaluating an SAE trained elsewhere on a domain that it never saw.

    python -m experiments.evaluate --workdir=runs/quickstart --config=configs/biomedical.py

takes the `text` and `eval` sections from here and all else from the run. The text is what the
quickstart leaves out of training, Wikipedia's lead paragraphs on biology and health sciences. Your
own file takes its place with

    --config.text.path=FILE.jsonl --config.text.where=

With experiments.train it is the quickstart trained on this text instead.
"""

from configs import quickstart


def get_config(arg=""):
    config = quickstart.get_config(arg)
    config.text.where = f"topic={quickstart.BIOLOGY}"
    return config
