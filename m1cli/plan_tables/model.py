"""Tables of what the model is and computes, whatever it runs on."""

from __future__ import annotations

from m1_stages.plan.estimate import Plan
from m1cli.console import console
from m1cli.plan_tables.numbers import si, table_of


def show_parameters(plan: Plan) -> None:
    """Show how many parameters each part has."""
    p = plan.parameters
    table = table_of("Parameters", "part", ["number", "share", "used by a token"])
    rows = {
        "experts": (p.experts, p.experts_active),
        "lightning attention": (p.lightning, p.lightning),
        "softmax attention": (p.softmax, p.softmax),
        "routers": (p.routers, p.routers),
        "norms": (p.norms, p.norms),
        "embedding": (p.embedding, 0),
        "head": (p.head, 0),
    }
    for name, (number, used) in rows.items():
        table.add_row(f"[dim]{name}[/]", f"{number:,}", f"{number / p.total:.1%}", f"{used:,}" if used else "-")
    table.add_section()
    table.add_row("total", f"{p.total:,}", "", f"{p.active:,}")
    console.print(table)
    console.print("[dim]Embedding and head are not counted as used, as in the published active sizes.[/]\n")


def show_flops(plan: Plan) -> None:
    """Show the FLOPs of training a token."""
    table = table_of("FLOPs of training one token (forward and backward)", "", [s.workload.stage for s in plan.stages])
    parts = {
        "attention projections": "projections",
        "experts": "experts",
        "head": "head",
        "softmax attention": "softmax",
        "lightning attention": "lightning",
    }
    for title, name in parts.items():
        table.add_row(f"[dim]{title}[/]", *(si(getattr(s.flops, name)) for s in plan.stages))
    table.add_section()
    table.add_row("total, one document a row", *(si(s.flops.total) for s in plan.stages))
    table.add_row("total, documents of the mix", *(si(s.mix_flops.total) for s in plan.stages))
    table.add_row("per step, one document", *(si(s.flops.total * s.workload.tokens_per_step) for s in plan.stages))
    table.add_row("[dim]tokens per step[/]", *(si(s.workload.tokens_per_step) for s in plan.stages))
    console.print(table)
    console.print("[dim]Softmax attention counts the causal half. Recomputation is not counted.[/]\n")


def show_generation(plan: Plan) -> None:
    """Show the FLOPs of generation beside the published claims."""
    table = table_of(
        "FLOPs of generating tokens, compared with DeepSeek-R1 (671B, 37B active)",
        "tokens",
        ["this model", "R1", "ratio", "published", "last token", "R1 absorbed", "ratio"],
    )
    for item in plan.generation:
        below = "<" if item.published == 0.5 else "~"
        table.add_row(
            f"{item.tokens:,}",
            si(item.ours),
            si(item.r1),
            f"[bold]{item.ratio:.0%}[/]",
            f"{below} {item.published:.0%}" if item.published else "-",
            f"{item.last_token:.0%}",
            si(item.r1_absorbed),
            f"{item.ratio_absorbed:.0%}",
        )
    console.print(table)
    console.print(
        "[dim]Sum over t of 2 x active parameters + attention to t tokens. R1: 61 layers x 128 heads x (192 + 128) "
        "channels x 2; absorbed x (576 + 512), as its servers decode. Both counts stay below the published 50%; "
        "the published 25% lies between them, nearest to the cost of the last token.[/]\n"
    )
