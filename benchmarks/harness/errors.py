"""The one error a user of the benchmarks can cause."""


class InputError(Exception):
    """A bad option, a wrong path or an unreadable file.

    Its message is one line for the terminal; the command line prints it and exits with status 2.
    """
