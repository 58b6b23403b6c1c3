"""YAML files that people write, read strictly: one mapping, no key twice, and 1e-4 is a number."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from everalign.errors import InputError


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without two of its surprises."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping; PyYAML itself would keep the last of two equal keys and not say so."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, (key, (key_node, _)) in enumerate(zip(keys, node.value, strict=True)):
            if key in keys[:index]:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is given twice", problem_mark=key_node.start_mark)
        return super().construct_mapping(node, deep)


# To PyYAML, which reads YAML 1.1, a number in this notation without a point is text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds one mapping.

    Raises:
        InputError: the file is missing, is no YAML (names the line), holds something else than a mapping, or gives
            a key twice.
    """
    try:
        value = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: no text file in UTF-8 ({error})") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f":{error.problem_mark.line + 1}"
        raise InputError(f"{path}{line}: broken YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: broken YAML: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: must hold keys and values, such as `model: tiny`")
    return value
