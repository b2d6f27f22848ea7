"""What the user can put right, said in one line."""


class UserError(Exception):
    """Ends the command with this message on stderr and exit code 2."""
