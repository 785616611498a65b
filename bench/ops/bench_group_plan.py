"""Speed of group_plan against the published knapsack in Python. `python bench/ops/bench_group_plan.py`"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mimfast.ops.group_plan import IMPLS, group_plan
from mimfast.testing.exact import Bench, Peer, main
from mimfast.testing.group_plan import BENCH, Case, knapsacks, make


def peers(case: Case, args: dict[str, Any], wanted: Any) -> dict[str, Peer]:  # noqa: ARG001
    def no_better(found: Any) -> bool:
        """Another plan is right as well; ours must not cost more pairs and slots."""
        (_, groups, size), overhead = found, args["overhead"]
        return wanted.groups * wanted.size * (wanted.size + overhead) <= groups * size * (size + overhead)

    return {"python": Peer(partial(knapsacks, **args), no_better, graphed=False)}


if __name__ == "__main__":
    sys.exit(main(Bench("group_plan", group_plan, IMPLS, BENCH, make, peers, yardstick="python")))
