"""Write the tables of docs/configuration.md from config.py and conf/*.yaml; --check only compares."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from segadapt.__main__ import VERBS
from segadapt.config import fields_of
from segadapt.corruptions import COMMON

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
MARK = "<!-- From here on: tools/config_page.py. -->\n"
OWN_TABLE = ("train.broad", "train.transforms.broad", "train.transforms", "train.losses")  # the first that fits
LAST = ("pretrain", "train-generative", "train")  # their sections `train` differ; `adapt` comes first


def section_of(name: str) -> str:
    """'model.generative.prompts.file' -> 'model.generative'; 'runs' -> ''."""
    parents = name.split(".")[:-1]
    return next(
        (own for own in OWN_TABLE if name.startswith(f"{own}.")),
        ".".join(parents[: 2 if parents[:1] == ["model"] else 1]),
    )


def sections() -> Iterable[tuple[str, str, dict[str, Any], dict[str, Any]]]:
    """(verb, section, its settings by name, their defaults); a section is of the first verb that has these settings."""
    known = set()
    for verb in sorted(VERBS, key=lambda verb: LAST.index(verb) if verb in LAST else -1):
        primary, schema, _, _ = VERBS[verb]
        with initialize_config_module("segadapt.conf", version_base="1.3"):
            values = OmegaConf.to_container(compose(primary))
        fields = fields_of(schema)
        for section in dict.fromkeys(map(section_of, fields)):
            rows = {name: item for name, item in fields.items() if section_of(name) == section}
            if (key := (section, *rows)) not in known:
                known.add(key)
                yield verb, section, rows, {name: _value(values, name) for name in rows}


def _value(values: Any, name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return values


def shown(value: Any) -> str:
    """A default as YAML would say it."""
    if value == list(COMMON):
        return "the 15"
    if isinstance(value, list):
        return f"[{', '.join(map(shown, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def allowed(rule: Any) -> str:
    """Choices or range."""
    low, high = (f"{rule[end]:g}" for end in ("low", "high"))
    if rule["choices"]:
        return ", ".join(rule["choices"])
    if high != "inf":
        return f"{low} .. {high}" if low != "-inf" else f"<= {high}"
    return f">= {low}" if low != "-inf" else ""


def type_name(annotation: Any) -> str:
    """'str | None', with the bar escaped for a table."""
    text = (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )
    return text.replace("typing.", "").replace("|", "\\|")


def tables() -> str:
    """All sections as Markdown."""
    found = list(sections())
    names = [section for _, section, _, _ in found]
    parts = []
    for verb, section, rows, defaults in found:
        of_verb = f" (segadapt {verb})" if names.count(section) > 1 or not section else ""
        lines = [
            f"### {section or verb}{of_verb}",
            "",
            "| key | type | default | allowed | meaning |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| `{name}` | {type_name(item.type)} | `{shown(defaults[name])}` | {allowed(rule)} | {rule['help']} |"
            for name, item, rule in ((name, item, item.metadata) for name, item in rows.items())
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def main() -> int:
    """Exit status 1 under --check if the page differs."""
    text = PAGE.read_text()
    page = text.partition(MARK)[0] + MARK + "\n" + tables()
    if "--check" not in sys.argv:
        PAGE.write_text(page)
        return 0
    if page != text:
        print(f"{PAGE.name} differs from config.py and conf/; run tools/config_page.py")
    return int(page != text)


if __name__ == "__main__":
    sys.exit(main())
