"""In place of a file that the archive leaves out: generation is tested by this repository's own tests."""


class GenerationTesterMixin:
    pass
