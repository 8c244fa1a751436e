"""What is said of the pictures before a run begins, kept for its page."""


class Notes:
    """`say(line)`, which keeps the lines too; on a process that is not the main one they are only kept."""

    def __init__(self, say):
        self.say, self.lines = say, []

    def __call__(self, line):
        self.lines.append(line)
        if self.say is not None:
            self.say(line)
