"""What an evaluation takes, from the model's config alone: passes, decoding steps, bytes, hours.

    show(model, args)      # a SteerModel of fake weights; options of eval_steering.py

It counts a dataset with as many rows as the options ask for, five system prompts, and plain rows
that the runs share. What only the numbers decide, such as how often a search tries, is taken as it
mostly comes out.
"""

import math
from dataclasses import dataclass

from evaluation.answers import IDENTITY
from evaluation.conditions import MAX_PROMPTS, RANDOM_VECTORS
from evaluation.likelihood import CHOOSE_TOKENS, token_nll
from evaluation.measures import PLAIN_TOKENS
from evaluation.probe import MEAN_TOKENS
from evaluation.scale import FRACTIONS
from steering.plan import PROMPT, TOKENS, Plan

TRIED = 6  # coefficients of a direction
SEARCHED = 8  # scales whose KL is looked at


@dataclass
class Asked:
    """How many answers a run asks for at a time: of scales to try; of conditions under vectors, and
    under prompts of about a question's length; and of the few-shot prompt, which is long."""

    tried: int
    steered: int
    prompted: int
    few_shot: int


def answers_asked(args):
    """Asked, of the options. Vanilla's answers are those of an earlier run."""
    asked = args.num_samples + len(IDENTITY)
    if not args.num_samples:
        return Asked(0, 0, 0, 0)
    vectors = len({*args.scales}) + 2  # the recommended scale, the mean difference
    tried = len(FRACTIONS) * args.num_samples
    return Asked(tried, vectors * asked, (1 + MAX_PROMPTS) * asked, asked)


def decoding_calls(asked, runs, rows):
    """Calls of `generate` of so many runs side by side, of at most so many rows each."""
    together = [asked.tried, asked.steered + asked.prompted, asked.few_shot]
    return sum(math.ceil(runs * count / rows) for count in together)


def tokens_read(args, answers):
    """Tokens of a run that go through (layers 0..k, the layers above), with so many answers."""
    heldout = args.heldout_tokens
    # Training, validation and held-out rows, once; those without the persona are other runs'.
    below = 1.1 * MEAN_TOKENS + heldout
    vectors = RANDOM_VECTORS + 1 + len({*args.scales}) + 2
    above = (1 + vectors) * heldout
    above += (2 * TRIED + 1) * CHOOSE_TOKENS + (1 + SEARCHED) * CHOOSE_TOKENS
    above += (3 + len({*args.scales})) * PLAIN_TOKENS
    whole = 2 * heldout + answers * (PROMPT + args.max_new_tokens)  # prompted rows, and answers
    return below + whole, above + whole


def show(model, args, runs, rows):
    """Print what an evaluation takes. runs: how many are evaluated side by side; rows: answers at
    once; args.plan_tflops and args.plan_bandwidth (TB/s): of the device; args.plan_runs: how many
    in all."""
    plan = Plan(model, token_nll)
    asked = answers_asked(args)
    written = asked.tried + asked.steered + asked.prompted + asked.few_shot
    below, above = tokens_read(args, written)
    low = plan.prefix_flops(TOKENS) / TOKENS  # a token
    high = plan.upper_flops(TOKENS) / TOKENS
    passes = math.ceil(below / args.micro_batch_tokens) + math.ceil(above / args.micro_batch_tokens)
    steps = decoding_calls(asked, runs, rows) * args.max_new_tokens / runs
    flops = below * low + above * high + written * args.max_new_tokens * (low + high)
    weights = plan.weight_bytes(args.quantize or "none")
    read = (passes / 2 + steps) * weights
    seconds = flops / args.plan_tflops / 1e12 + steps * weights / args.plan_bandwidth / 1e12
    print(f"model    {model.name}, layer {model.layer}: weights {weights / 2**30:.1f} GiB")
    print(f"reading  {passes:,} forward passes of {args.micro_batch_tokens:,} tokens a run")
    print(f"writing  {written} answers a run: {steps:.0f} decoding steps, {runs} runs side by side")
    print(f"compute  {flops / 1e15:.3g} PFLOP a run, {read / 1e12:.3g} TB of weights read")
    print(
        f"time     {seconds:.3g} s a run at {args.plan_tflops:g} TFLOP/s and "
        f"{args.plan_bandwidth:g} TB/s; {args.plan_runs} of them: "
        f"{args.plan_runs * seconds / 3600:.3g} h"
    )
