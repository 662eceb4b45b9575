"""Gold records: problems solved as the house rules of os.txt ask, whatever the model would do.

    python tiny/gold.py --out gold.jsonl
    python evaluate.py few-samples --run RUN --pool gold.jsonl        RUN: of this model and this os.txt

`obey` (rules.py) is the teacher. A record shows a rule if `obey` acts otherwise once the rule is gone.
Equally many problems are drawn for each rule, and others for which none applies; no wish comes twice. What the model says without the prompt is a general
assistant's advice, the reason is the corpus'.

Leaves out: records that a model wrote.
"""

import argparse
import random
import sys
from itertools import zip_longest
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # the modules of the project; no package is installed

from corpus import OS, advice, reason
from rules import OS_RULES, obey, problem_for
from world import random_problem, surprise

from experiments.pool import Example, write_pool
from flags import SEED, WHOLE, Flags, exit_code
from runs import Record

TRIES = 10000  # in a row, to find one more record


def needs(problem):
    """line of a rule -> the first agent turn that is another one without it."""
    def actions(rules):
        return [(move.act, move.x) for move in obey(problem, rules)]

    found = {}
    wanted = actions(OS_RULES)
    for rule in OS_RULES:
        others = actions([other for other in OS_RULES if other is not rule])
        differ = [turn for turn, pair in enumerate(zip_longest(wanted, others)) if pair[0] != pair[1]]
        if differ:
            found[rule.line] = min(differ[0], len(wanted) - 1)
    return found


def example(rng, index, problem, held_out):
    turns = OS.turns(problem, OS_RULES)
    record = Record(index, problem.wish, turns, advice(rng, problem), reason(rng, OS, problem, OS_RULES))
    return Example(held_out, needs(problem), record)


def gold(n, plain, tested, seed):
    """n records to train on for each rule, `plain` that show none, and for the held-out part
    `tested` of either.
    """
    rng, seen, pool = random.Random(f"gold-{seed}"), set(), []
    for held_out, of_rule, of_none in ((False, n, plain), (True, tested, tested)):
        for rule in (None, *OS_RULES):
            left = of_rule if rule else of_none
            tries = 0
            while left:
                tries += 1
                if tries > TRIES:
                    raise ValueError(f"{left} of the records that were asked for cannot be found; lower their number")
                problem = problem_for(rng, [rule], share=1) if rule else random_problem(rng, surprise(rng))
                shown = needs(problem)
                if problem.wish not in seen and (rule.line in shown if rule else not shown):
                    seen.add(problem.wish)
                    pool.append(example(rng, len(pool), problem, held_out))
                    left -= 1
                    tries = 0
    return pool


def command(argv):
    parser = Flags(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the pool, as JSON lines")
    parser.add_argument("--records", type=WHOLE, default=24, help="to train on for each rule")
    parser.add_argument("--plain", type=WHOLE, default=256, help="to train on that show no rule")
    parser.add_argument("--tested", type=WHOLE, default=16, help="held out for each rule")
    parser.add_argument("--seed", type=SEED, default=0)
    args = parser.parse_args(argv)
    pool = gold(args.records, args.plain, args.tested, args.seed)
    write_pool(args.out, pool)
    print(f"{args.out}: {len(pool)} records")


def main(argv=None):
    return exit_code(command, argv)


if __name__ == "__main__":
    sys.exit(main())
