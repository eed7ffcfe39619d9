"""Names that would like to be paths, patterns or code."""

HOSTILE = (
    "", ".", "..", "../x", "../../etc/passwd", "/etc/passwd", "/", "//", "a/b", "a\\b", "..\\x",
    "C:\\x", "C:", "\\\\host\\share", "~", "~/x", "~root", "file:///etc/passwd", "$HOME", "${HOME}",
    "`id`", "$(id)", "; rm -rf x", "| id", "& id", "a b", " a", "a ", "a\n", "\n", "\r\n", "a\tb",
    "a\0b", "\0", "\x1b[2J", "\x7f", "\u202e", "\u200b", "\ufeff", "\uff0e\uff0e/x", "é", "名",
    "-rf", "--help", "_", "__class__", "__init__", "-", "%s", "%n", "{0}", "{0.__class__}", "{x!r}",
    "<script>", "' OR 1=1 --", '"', "'", "a.weight", "*", "?", "[a]", ".*", "(a+)+$", "^", "a,b",
    "x" * 129, "x" * 100_000, "con.txt", "a:b", "@", "#",
)  # fmt: skip
