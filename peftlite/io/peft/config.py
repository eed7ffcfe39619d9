"""Config: an adapter's settings in PEFT, each looked at before it is believed."""

from __future__ import annotations

from typing import Any

from peftlite.errors import FileError
from peftlite.io.peft.regex import Regexes
from peftlite.table import short

# what says where an adapter comes from, where its tensors sit, or how it is trained: the tensors
# themselves say where they sit, and their shapes the rank
HARMLESS = frozenset(
    """peft_type peft_version auto_mapping base_model_name_or_path revision task_type
    inference_mode target_modules exclude_modules layers_to_transform layers_pattern
    fan_in_fan_out ensure_weight_tying r rank_pattern n_frequency n_frequency_pattern init_r
    init_weights init_lora_weights init_ia3_weights init_logits_std init_vector_bank_bound
    loftq_config eva_config corda_config lora_ga_config velora_config megatron_core
    qalora_group_size rank_dropout rank_dropout_scale module_dropout vera_dropout vblora_dropout
    boft_dropout boft_block_size boft_block_num boft_n_butterfly_factor oft_block_size
    num_vectors vector_length mask_type random_seed use_effective_conv2d""".split()
)


class Config:
    """An adapter's settings: plain data, each looked at before it is believed."""

    data: dict[str, Any]
    path: str

    def __init__(self, data: dict[str, Any], path: str):
        self.data, self.path = data, path
        self._taken = set(HARMLESS)
        self._regexes = Regexes()

    def take(self, name: str, default: Any, *kinds: type) -> Any:
        """A setting of the kinds given, or else the default where it is left out or null."""
        self._taken.add(name)
        value = self.data.get(name)
        if value is None:
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise FileError(f"{self.path!r} has {name!r} as {short(value)}")
        if isinstance(value, int | float) and not abs(value) <= 1e9:
            raise FileError(f"{self.path!r} has {name!r} as {value}, which no training has")
        return value

    def number(self, name: str, default: float) -> float:
        return self.take(name, default, int, float)

    def flag(self, name: str, default: bool = False) -> bool:
        return self.take(name, default, bool)

    def names(self, name: str) -> list[str]:
        """A list of the ends of paths."""
        found = self.take(name, [], list)
        if not all(isinstance(entry, str) for entry in found):
            raise FileError(f"{self.path!r} has {name!r} as {short(found)}")
        return found

    def matches(self, name: str, pattern: str, path: str) -> bool:
        """Whether a regex in a setting matches all of a path, as peft has it."""
        try:
            return self._regexes.matches(pattern, path)
        except ValueError as error:
            raise FileError(
                f"{self.path!r} has a regex in {name!r} that can't be followed, {short(pattern)}, "
                f"since {error}: write out the modules' paths"
            ) from error

    def patterned(self, name: str, path: str, default: float, form: str = r"(.*\.)?({})") -> float:
        """A number that some modules have for themselves, by a regex for the end of their path."""
        table = Config(self.take(name, {}, dict), self.path)
        for key in table.data:
            if self.matches(name, form.replace("{}", key), path):
                return table.number(key, default)
        return table.number(path, default)

    def before(self, *release: int) -> bool:
        """Whether it is of a peft before a release; those that say none are old."""
        parts = self.take("peft_version", "", str).split(".")
        return tuple(int(part) if part.isdigit() else 0 for part in parts[:2]) < release

    def leave(self, *names: str) -> None:
        """Passes over settings that peft's method of this kind doesn't look at."""
        self._taken.update(names)

    def finish(self) -> None:
        """Raises FileError if there are settings that may change the model in an unknown way."""
        unknown = {k: v for k, v in self.data.items() if k not in self._taken and v}
        for name, value in unknown.items():
            raise FileError(
                f"{self.path!r} is a {self.data['peft_type']} with {name!r} as {short(value)}, "
                "which may change the model in a way that peftlite doesn't have"
            )


def ends(path: str, end: str) -> bool:
    """Whether a path is, or ends in, dotted words."""
    return path == end or path.endswith(f".{end}")
