"""The tree that `align lineage` prints; apart, so that the command line starts without rich."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text
from rich.tree import Tree

from alignment.runs.ancestry import Ancestry, Link, Node
from alignment.runs.outputs import short_hash

_UNWRAPPED = 10_000


def show(ancestry: Ancestry) -> None:
    """Print the tree of an ancestry."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _UNWRAPPED  # whoever filters lines wants them whole
    console.print(render(ancestry))


def render(ancestry: Ancestry) -> Tree:
    """The tree of an ancestry; a run that is in it twice is described once."""
    shown: set[str] = set()
    root = ancestry.nodes[ancestry.root]
    tree = Tree(_describe(root))
    _grow(tree, ancestry.root, ancestry, shown)
    return tree


def _grow(tree: Tree, key: str, ancestry: Ancestry, shown: set[str]) -> None:
    shown.add(key)
    node = ancestry.nodes[key]
    for stage in node.stages:
        _grow_branch(tree, stage, Text(), ancestry, shown)
    for link in node.parents:
        _grow_branch(tree, link.target, _arrow(link), ancestry, shown)


def _grow_branch(tree: Tree, target: str, label: Text, ancestry: Ancestry, shown: set[str]) -> None:
    node = ancestry.nodes[target]
    if target in shown and node.kind != "model":
        tree.add(label + Text(node.name, style="bold") + Text(" (described above)", style="dim"))
    else:
        _grow(tree.add(label + _describe(node)), target, ancestry, shown)


def _arrow(link: Link) -> Text:
    """Which setting leads to a parent, and whether it still holds what it held."""
    what = f"{link.key or link.output}: "
    text = Text(what, style="cyan")
    then, now = short_hash(link.recorded), short_hash(link.current)
    if link.state == "changed":
        mark = f"[changed since: {link.output} {then} then, {now} now] "
        text += Text(mark, style="bold yellow")
    if link.state == "missing":
        text += Text(f"[missing: {link.output} {then}] ", style="bold red")
    return text


def _describe(node: Node) -> Text:
    text = Text(node.name, style="bold")
    if node.kind == "model":
        return text + Text(" (base model)")
    if node.kind == "missing":
        return text + Text(f" {_reason(node)}", style="red")
    facts = [node.method or node.kind]
    if node.kind == "pipeline":
        facts.append(f"{len(node.stages)} stages")
    if node.steps is not None:
        facts.append(f"{node.steps} steps")
    if not node.finished:
        facts.append("not finished")
    if node.time is not None:
        facts.append(node.time[:16].replace("T", " "))
    text += Text(f"  {', '.join(facts)}")
    hashes = [f"{name} {short_hash(value)}" for name, value in _hashes(node).items()]
    return text + Text("\n" + "  ".join(hashes), style="dim") if hashes else text


def _hashes(node: Node) -> dict[str, str]:
    """What the run made, how it read text, and the data it learned from."""
    made = {f"made {name}": value for name, value in node.made.items()}
    used = {name: node.used[name] for name in ("tokenizer", "template") if name in node.used}
    data = {"from data": node.used["data"]} if "data" in node.used else {}
    start = {"from weights": node.used["model"]} if "model" in node.used and not made else {}
    return made | start | used | data


def _reason(node: Node) -> str:
    return f"(no run at {node.path})" if node.problem is None else f"({node.problem})"
