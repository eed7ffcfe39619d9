"""Forms: the methods of PEFT by their names there."""

from peftlite.io.peft.form import Form
from peftlite.io.peft.forms.lora import AdaLoRAForm, LoRAForm
from peftlite.io.peft.forms.orthogonal import BOFTForm, HRAForm, OFTForm
from peftlite.io.peft.forms.products import LoHaForm, LoKrForm
from peftlite.io.peft.forms.shared import VBLoRAForm, VeRAForm
from peftlite.io.peft.forms.sparse import FourierFTForm, SHiRAForm
from peftlite.io.peft.forms.vectors import BEFTForm, IA3Form

FORMS: dict[str, Form] = {
    "LORA": LoRAForm(), "IA3": IA3Form(), "LOHA": LoHaForm(), "LOKR": LoKrForm(), "OFT": OFTForm(),
    "BOFT": BOFTForm(), "HRA": HRAForm(), "VERA": VeRAForm(), "VBLORA": VBLoRAForm(),
    "FOURIERFT": FourierFTForm(), "ADALORA": AdaLoRAForm(), "SHIRA": SHiRAForm(),
    "BEFT": BEFTForm(),
}  # fmt: skip
