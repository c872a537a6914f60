"""The one exception that is meant for the user's eyes."""

LONGEST = 700  # characters; a file from a stranger may bring names of any length into a message


class UserError(ValueError):
    """A mistake of input. One line: what was found, what was expected, what to do."""

    __module__ = "flowcache_core"  # its public name, which ComfyUI shows in front of the line

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(message: str) -> str:
    """Makes one printable line of bounded length."""
    line = " ".join(message.split())
    line = line if len(line) <= LONGEST else line[:LONGEST] + " …"
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def shortened(words: str, longest: int) -> str:
    """Cuts words that are longer than so many characters."""
    return words if len(words) <= longest else words[: longest - 3] + "..."


def first_line(error: Exception) -> str:
    """Gives what an error of a library says first, without a full stop."""
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(". ")
