"""The one exception that a user's mistake or a machine's limit raises."""


class QwlibError(ValueError):
    """Says in one line what is wrong and what to do; the command line prints it without a traceback."""
