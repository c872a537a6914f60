"""The one exception that is meant for the user's eyes."""


class UserError(ValueError):
    """A mistake of input. One line: what was found, what was expected, what to do."""
