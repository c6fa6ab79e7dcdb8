"""The one exception for mistakes a user can mend; the command line prints it as a single line."""


class UserError(Exception):
    """Bad input, configuration or environment.

    The message names the file, row, key or flag at fault and the remedy.
    """
