"""Files that other libraries packed; `make.py` wrote them, and needs those libraries."""
