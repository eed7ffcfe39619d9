"""What the demo says: what is coming, what its columns are and show, and what to type next."""

COMING = """
What is coming, in some two minutes on two CPU cores and with nothing to download:
  1. A small language model, the base, learns Python's own source code.
  2. It is frozen, and two deltas are trained on it, each a LoRA of rank {rank}: docs on English,
     the text of Python's help, and names on the names of Unicode's characters.
  3. They are saved, loaded into a fresh copy of the base, and measured on text that was held out.
  4. What every delta promises is checked, number by number.
"""

COLUMNS = """
Each line is the base, by itself or with one delta:
  trainable   the parameters that were trained, and their share of the base's
  file        what it takes on disk
  bits on …   bits per byte of held-out text: how far the next byte is from being foreseen. Less is
              better; 8 is knowing nothing
  swap        the median time that pl.use takes to switch to it
"""

WHY = """
A delta is better than the base on the text that it learned, and as a rule worse on the others: it
was trained on that text alone, and the weights that it changes serve all three. Nothing in its
training asked for the rest to be kept; a probe shows what is lost as it happens. It is the delta
that forgets: the base has kept every bit, and pl.use(model, None) has it back.

What every delta promises, on these very models:
"""

NEXT = """
What to type next:
  peftlite inspect {file}
                           what is in the file of a delta
  peftlite train --help    a delta of your own: a transformers model, and your text
In Python, with a model of yours:
  import peftlite as pl
  print(pl.plan(model, pl.LoRA(rank=8)))                  # what would be trained
  delta = pl.attach(model, pl.LoRA(rank=8), name="mine")  # now train delta.parameters()
  print(delta.tree())                                     # where it sits
  pl.save(delta, "mine.safetensors")
"""
