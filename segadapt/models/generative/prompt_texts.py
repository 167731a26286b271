"""What the text encoders read for each class: a template and its exceptions, or a file of whole prompts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from segadapt.errors import UserError, did_you_mean


def fill_template(names: Sequence[str], template: str, overrides: Mapping[str, str]) -> list[str]:
    """A prompt a class: its own of `overrides`, else the template's.

    Raises:
        UserError: not one {} in the template; a name that is no class.
    """
    if template.count("{}") != 1:
        raise UserError(
            f"model.generative.prompts.template={template!r} has {template.count('{}')} places {{}} for the class "
            f"name; expected one. Write it as 'a photo of a {{}}'."
        )
    by_class = {name.strip(): prompt for name, prompt in overrides.items()}
    for name in by_class:
        if name not in names:
            raise UserError(
                f"model.generative.prompts.overrides: {name!r} is not a class of the data set."
                f"{did_you_mean(name, names)}"
            )
    return [by_class.get(name, template.replace("{}", name)) for name in names]


def read_prompts(path: Path, names: Sequence[str]) -> list[str]:
    """Each class's whole prompt, in label order: the lines of a text file, or a .json object of name: prompt.

    Raises:
        UserError: not readable; a class without prompt, or with two; a prompt of no class. The first one is named.
    """
    where = f"model.generative.prompts.file={path}"
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")  # with or without a mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{where} cannot be read ({error}); expected UTF-8 text. Correct the path or the file."
        ) from error
    if path.suffix != ".json":
        lines = [line.strip() for line in text.rstrip().splitlines()]
        for index in range(max(len(lines), len(names))):
            if index >= len(names):
                raise UserError(f"{where}: line {index + 1} is of no class; expected {len(names)} lines, one a class "
                                "in label order. Delete it.")  # fmt: skip
            if index >= len(lines) or not lines[index]:
                raise UserError(f"{where}: line {index + 1} is missing or empty; expected the prompt of class "
                                f"{index}, {names[index]!r}, one of {len(names)}. Write a line a class.")  # fmt: skip
        return lines
    try:
        pairs = json.loads(text, object_pairs_hook=list)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{where}: {error}; expected JSON. Correct the file.") from error
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise UserError(f"{where} holds no JSON object; expected one of class name: prompt. Correct the file.")
    by_class: dict[str, str] = {}
    for name, prompt in ((name.strip(), prompt) for name, prompt in pairs):
        if name not in names:
            raise UserError(f"{where}: {name!r} is not a class of the data set.{did_you_mean(name, names)}")
        if name in by_class:
            raise UserError(f"{where}: class {name!r} has two prompts; expected one. Delete one of them.")
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"{where}: the prompt of {name!r} is {prompt!r}; expected text. Write one.")
        by_class[name] = prompt.strip()
    for name in names:
        if name not in by_class:
            raise UserError(f"{where}: class {name!r} has no prompt; expected one for each of {len(names)}. Add it.")
    return [by_class[name] for name in names]
