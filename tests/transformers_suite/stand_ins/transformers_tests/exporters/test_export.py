"""In place of a file that the archive leaves out: exported and compiled models give what they give as they are."""

import torch


class ExportTesterMixin:
    def _prepare_for_export(self, model_class):
        torch.manual_seed(0)
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config.get_text_config().use_cache = False
        model = model_class(config).eval()
        inputs = self._prepare_for_class(inputs, model_class)
        with torch.no_grad():
            return model, inputs, model(**inputs)[0]

    def test_export(self) -> None:
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__):
                model, inputs, expected = self._prepare_for_export(model_class)
                with torch.no_grad():
                    exported = torch.export.export(model, (), inputs)
                    torch.testing.assert_close(exported.module()(**inputs)[0], expected)

    def test_compile_without_graph_breaks(self) -> None:
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__):
                torch.compiler.reset()
                model, inputs, expected = self._prepare_for_export(model_class)
                with torch.no_grad():
                    compiled = torch.compile(model, fullgraph=True, backend="eager")
                    torch.testing.assert_close(compiled(**inputs)[0], expected)
