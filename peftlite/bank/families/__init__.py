"""How a bank changes each row by its own delta: one file for each family of methods.

    fields      what every slot holds at a site, by name: LoRA's are a (R, i), b (o, R), scale, rank
    contents    what one slot holds: a tensor or a number for each field
    tables      all slots at once: a field's contents, stacked: (slots + 1, *shape); 0 is the base
    encode      a delta's patches at the site → contents, when the bank loads it
    used        the contents without their padding: a delta of rank r < R fills r of R rows
    decode      contents → patches, when the bank gives the delta back
    mix         the module's call, row j changed by the contents of slot `rows.slots[j]`

A family is a `Mixed`, the patch that the bank plants; registry.py says which patches it stands for.
"""
