"""Write each setting's help from config*.py as the comment behind its line in conf/*.yaml; --check only compares."""

import re
import sys
from pathlib import Path

from segadapt import config, config_data, config_pretraining, config_training, config_verbs

CONF = Path(config.__file__).parent / "conf"
SCHEMAS = [
    config_verbs.CheckConfig,
    config_verbs.DiagnoseConfig,
    config.EvaluateConfig,
    config_training.TrainConfig,
    config_data.CorruptConfig,
    config_data.ConvertConfig,
    config_data.SplitConfig,
    config_verbs.AlignConfig,
    config_verbs.GridConfig,
    config_verbs.ResultsConfig,
    config_verbs.ReportConfig,
]


def prefix_of(path: Path) -> str:
    """Where the content of a group file lands: conf/model/generative/sd3_medium.yaml -> 'model.generative.'."""
    folder = path.parent.relative_to(CONF)
    return "" if folder.parts[:1] in ((), ("base",), ("experiment",), ("tuned",)) else ".".join(folder.parts) + "."


def trained_by(path: Path) -> type:
    """Whose section `train` a file's is: of the three, only this one's words hold there."""
    if path.stem in ("pretrain", "classifier"):
        return config_pretraining.PretrainConfig
    if "segmenter" in path.stem or "# segadapt train experiment=" in path.read_text():
        return config_training.TrainConfig
    return config_training.TrainGenerativeConfig


def commented(path: Path) -> str:
    """The file's text with every setting's comment as config.py words it."""
    helps: dict[str, str] = {}
    for schema in (*SCHEMAS, trained_by(path)):
        helps |= {name: item.metadata["help"] for name, item in config.fields_of(schema).items()}
    lines, stack = [], []
    for line in path.read_text().splitlines():
        match = re.match(r"^( *)([A-Za-z_0-9]+):(.*)$", line)
        if match:
            stack = [entry for entry in stack if entry[0] < len(match[1])] + [(len(match[1]), match[2])]
            name = prefix_of(path) + ".".join(key for _, key in stack)
            if name in helps:
                line = f"{line.split('  # ')[0].rstrip()}  # {helps[name]}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def main() -> int:
    """Exit status 1 under --check if a file differs."""
    stale = [path for path in sorted(CONF.rglob("*.yaml")) if commented(path) != path.read_text()]
    for path in stale:
        if "--check" in sys.argv:
            print(f"{path.relative_to(CONF)}: comments differ from config.py; run tools/config_comments.py")
        else:
            path.write_text(commented(path))
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
