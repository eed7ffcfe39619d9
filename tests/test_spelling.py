"""What users of other libraries type is answered with what to type here."""

import copy
import pickle
import re
from typing import Any

import pytest
from torch import nn

import peftlite as pl
from peftlite import spelling


def test_a_method_names_its_own_arguments() -> None:
    with pytest.raises(pl.PeftliteError) as error:
        pl.LoRA(r=8, lora_alpha=16, target_modules=["q"], bias="none")  # type: ignore
    assert str(error.value).startswith(
        "LoRA takes no r=, lora_alpha=, target_modules=, bias=; type rank=8, alpha=16, "
        "targets=['q']; for bias=, a list, [pl.LoRA(...), pl.BitFit()]; it takes targets, exclude, "
    )
    with pytest.raises(pl.PeftliteError, match=r"takes no rnak=; type rank=4; it takes"):
        pl.DoRA(rnak=4)  # type: ignore
    for kind, name in ((pl.PromptTuning, "prompt_length"), (pl.PrefixTuning, "prefix_length")):
        with pytest.raises(pl.PeftliteError, match=f"; type {name}=8; it takes"):
            kind(num_virtual_tokens=8)  # type: ignore


def test_the_trainer_names_its_own_arguments() -> None:
    loss: Any = pl.losses.classification
    with pytest.raises(
        pl.PeftliteError, match=r"type lr=0\.1, epochs=3; for bf16=, autocast='bf16'"
    ):
        pl.Trainer(nn.Linear(2, 2), loss, [], learning_rate=0.1, num_train_epochs=3, bf16=True)  # type: ignore


@pytest.mark.parametrize(
    ("name", "there"),
    [("get_peft_model", "type pl.attach(model, pl.LoRA(rank=8))"), ("LoraConfig", "there is LoRA"),
     ("Lora", "there is LoRA"), ("PrefixTuningConfig", "there is PrefixTuning")],
)  # fmt: skip
def test_names_of_peft(name: str, there: str) -> None:
    with pytest.raises(AttributeError, match=re.escape(f"no attribute {name!r}; {there}")):
        getattr(pl, name)


def test_a_delta_is_no_model_of_peft() -> None:
    delta = pl.attach(nn.Linear(2, 2), pl.LoRA(rank=1))
    for name, there in {"print_trainable_parameters": "type print(delta)", "_x": ""}.items():
        with pytest.raises(
            AttributeError, match=re.escape(f"no attribute {name!r}") + f"(; {there})?"
        ):
            getattr(delta, name)
    assert not hasattr(delta, "save_pretrained")
    assert pickle.loads(pickle.dumps(pl.LoRA(rank=3))) == copy.deepcopy(pl.LoRA(rank=3))


def test_all_that_is_advised_is_there() -> None:
    advice = " ".join([*spelling.NAMES.values(), *spelling.ADVICE.values()])
    for path in re.findall(r"pl\.([\w.]+)", advice):
        found: Any = pl
        for name in path.split("."):
            found = getattr(found, name)
    taken = {name for kind in [*pl.Method.known.values(), pl.Trainer] for name in vars(kind)}
    taken |= {name for kind in pl.Method.known.values() for name in kind.__dataclass_fields__}
    taken |= {*pl.Trainer.__dataclass_fields__}
    assert not {own for names in spelling.ARGUMENTS.values() for own in names.split()} - taken
