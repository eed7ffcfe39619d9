"""To: the formats that a delta's file is converted to, by name; a file that needs no torch."""

from typing import Literal

To = Literal["safetensors", "peftlite", "peft", "kohya", "diffusers", "gguf"]
