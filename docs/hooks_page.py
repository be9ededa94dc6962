"""The reference of the hooks, made from their specifications: ``python docs/hooks_page.py [--check]``.

What a hook is for, takes, returns and raises stands in the docstrings of :mod:`dopt_api.hookspec`, and the examples in
``hooks_example.py`` beside this file. The page has both behind its introduction, so that neither is written twice.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from dopt_api import hookspec  # noqa: E402 - after the path to it

PAGE = HERE / "hooks.md"
EXAMPLE = HERE / "hooks_example.py"
MARK = "<!-- From here on made by docs/hooks_page.py from dopt_api/hookspec.py and docs/hooks_example.py -->\n"
SECTION = re.compile(r"^(Args|Returns|Raises|Example):$", re.MULTILINE)
ITEM = re.compile(r"^([\w.]+): ")


def sections(docstring: str) -> dict[str, str]:
    """Return the parts of a docstring by their titles, that before the first title under an empty one."""
    parts = SECTION.split(inspect.cleandoc(docstring))
    return {
        "": parts[0],
        **{title: inspect.cleandoc(text) for title, text in zip(parts[1::2], parts[2::2], strict=True)},
    }


def markdown(text: str) -> str:
    """Turn what docstrings have of reStructuredText into Markdown."""
    return re.sub(r":\w+:`([^`]+)`", r"`\1`", text).replace("``", "`").strip()


def items(text: str) -> dict[str, str]:
    """Return the entries of a list such as that of the arguments, by their names."""
    found = [ITEM.split(" ".join(entry.split()), maxsplit=1) for entry in re.split(r"\n(?=\S)", text.strip())]
    return {name: markdown(rest) for _, name, rest in found}


def section_of(hook: str) -> str:
    """Return the section about a hook.

    Raises:
        SystemExit: Its specification lacks a part.
    """
    function = getattr(hookspec, hook)
    parts = sections(function.__doc__ or "")
    arguments = items(parts["Args"]) if "Args" in parts else {}
    returns = "Nothing." if str(inspect.signature(function).return_annotation) == "None" else parts.get("Returns", "")
    if not parts[""] or not returns or list(arguments) != list(inspect.signature(function).parameters):
        sys.exit(f"{hook}: its docstring in dopt_api/hookspec.py needs a summary, all arguments, and what it returns")
    errors = items(parts["Raises"]) if "Raises" in parts else {}
    names = {name: name.rpartition(".")[2] for name in errors}
    return "\n".join(
        [
            f"## `{hook}`\n",
            f"**Purpose.** {markdown(parts[''])}\n",
            "**Arguments.**" + ("\n" if arguments else " None.\n"),
            *[f"- `{name}`: {text}" for name, text in arguments.items()],
            *([""] if arguments else []),
            f"**Returns.** {markdown(returns)}\n",
            "**Errors.**" + ("\n" if errors else " None of its own.\n"),
            *[f"- [`{names[name]}`](errors.md#{names[name].lower()}): {text}" for name, text in errors.items()],
            *([""] if errors else []),
            "**Example.**\n",
            f"```python\n{example(hook)}```\n",
        ]
    )


def example(hook: str) -> str:
    """Return the code of a hook in the example."""
    code = EXAMPLE.read_text(encoding="utf-8")
    found = re.search(rf"^@hookimpl\ndef {hook}\(.*?(?=^@|\Z)", code, re.MULTILINE | re.DOTALL)
    if found is None:
        sys.exit(f"{hook}: {EXAMPLE.name} does not implement it")
    return found[0].rstrip() + "\n"


def page(text: str) -> str:
    """Return the page with everything that is made from its sources made anew."""
    before, _, _ = EXAMPLE.read_text(encoding="utf-8").partition("@hookimpl")
    code = before.partition('"""\n\n')[2].rstrip()
    head, _, _ = text.partition(MARK)
    head = re.sub(r"```python\n.*?```", lambda _: f"```python\n{code}\n```", head, count=1, flags=re.DOTALL)
    hooks = re.findall(r"^def (dopt_\w+)", inspect.getsource(hookspec), re.MULTILINE)
    return head + MARK + "\n" + "\n".join(section_of(hook) for hook in hooks)


if __name__ == "__main__":
    old = PAGE.read_text(encoding="utf-8")
    new = page(old)
    if "--check" in sys.argv[1:] and new != old:
        sys.exit(f"{PAGE} is not what its sources say. Fix: python docs/hooks_page.py")
    PAGE.write_text(new, encoding="utf-8", newline="\n")
