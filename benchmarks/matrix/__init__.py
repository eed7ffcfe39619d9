"""The matrix of peft's types, settings and models, each case tried in peft and in peftlite."""
