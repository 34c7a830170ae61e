"""In place of a file that the archive leaves out: export is tested by this suite's own tests."""


class ExportTesterMixin:
    pass
