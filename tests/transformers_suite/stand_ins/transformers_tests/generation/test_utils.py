"""In place of a file that the archive leaves out: README.md says where generation is tested."""


class GenerationTesterMixin:
    pass
