"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """Bad input: a config, data set, checkpoint, folder or network address that the user can mend.

    The message is one line that names the thing at fault and the way out. The command line prints it without a
    traceback and exits with code 2.
    """
