"""What a command shows: progress bars on stderr, and the final table on stdout."""

import sys
from typing import Any

from tqdm import tqdm

from scale_sae_jax.console import Console


class Bars(Console):
    """One progress bar at a time, with `label` before what it says."""

    def __init__(self, label: str = ""):
        self._label, self._bar, self._what = label, None, ""

    def note(self, text: str) -> None:
        tqdm.write(f"note: {text}", file=sys.stderr)

    def progress(self, what: str, done: int, total: int) -> None:
        self._show(what, done, total, "tokens")

    def step(self, record: dict[str, Any], total: int) -> None:
        self._show("train", record["step"], total, "steps")
        self._bar.set_postfix_str(
            f"loss {record['loss']:.4g}, FVU {record['fvu']:.3f}, L0 {record['l0']:.1f}, "
            f"dead {record['dead']:.1%}, {record['tokens_per_second']:,.0f} tokens/s"
        )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, what: str, done: int, total: int, unit: str) -> None:
        if what != self._what or self._bar is None:
            self.close()
            self._what = what
            # The clock starts here: what was done before does not count in the rate.
            self._bar = tqdm(desc=self._label + what, total=total, unit=f" {unit}",
                             unit_scale=unit == "tokens", initial=done,
                             dynamic_ncols=True, mininterval=1)
        self._bar.total = total
        self._bar.update(done - self._bar.n)


def table(results: dict[str, Any]) -> str:
    """The short table at the end of a run."""

    def shown(value: float, form: str) -> str:
        return format(value, form if abs(value) < 1e9 else ".3g")

    def number(key: str, form: str) -> str:
        value = results.get(key)
        return "-" if value is None else shown(value, form)

    def interval(key: str) -> str:
        bounds = results.get(f"{key}_ci95")
        if not bounds or None in bounds:
            return ""
        return "  [{}, {}]".format(*(shown(bound, ".4f") for bound in bounds))

    load = results.get("expert_load") or [1.0]
    rows = [
        ("FVU", number("fvu", ".4f") + interval("fvu")),
        ("FVU of rank-k PCA", number("fvu_pca", ".4f")),
        ("delta CE", number("delta_ce", ".4f") + interval("delta_ce")),
        ("CE recovered", number("recovered", ".4f")),
        ("L0", number("l0", ".1f")),
        ("dead latents", number("dead", ".1%")),
        ("redundancy > 0.7", f"{number('redundancy_0.7', '.4f')}  "
         f"(random: {number('redundancy_0.7_null', '.4f')})"),
        ("expert load", f"{min(load):.3f} to {max(load):.3f}, CV {number('load_cv', '.2f')}"),
        ("training tokens/s", number("tokens_per_second", ",.0f")),
        ("evaluated on", f"{results['eval_tokens']:,} held-out tokens of {results['eval_text']}"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)
