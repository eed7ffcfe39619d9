"""Config: an adapter's settings in PEFT, each looked at before it is believed."""

from __future__ import annotations

from typing import Any

from peftlite.errors import FileError
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

    def __init__(self, data: dict[str, Any], path: str):
        self.data, self.path = data, path
        self._taken = set(HARMLESS)

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

    def patterned(self, name: str, path: str, default: float) -> float:
        """A number that some modules have for themselves, by the end of their path."""
        table = Config(self.take(name, {}, dict), self.path)
        for key in table.data:
            # a regex in peft; of those, an escaped and anchored path is what a list may hold
            end = key.removeprefix("^").removesuffix("$").replace("\\", "")
            if set(end) & set("*+?|()[]{}^$"):
                raise FileError(
                    f"{self.path!r} has a regex in {name!r}, {key!r}: write out the modules' paths"
                )
            if ends(path, end):
                return table.number(key, default)
        return default

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
