"""Forms: the methods of PEFT by their names there."""

from peftlite.io.peft.form import Form
from peftlite.io.peft.forms import lora, orthogonal, products, shared, sparse, vectors

__all__ = ["FORMS", "lora", "orthogonal", "products", "shared", "sparse", "vectors"]

FORMS: dict[str, Form] = {form.type: form() for form in Form.__subclasses__()}
