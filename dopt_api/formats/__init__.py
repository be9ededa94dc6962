"""From an exported model and its parameter file to the form that a runtime takes.

A format is a function ``write(model_file, params, folder)`` that writes files into an empty folder. The toolkit's own
are below; other distributions add theirs by an entry point of the group ``dopt.formats``, whose name is the format's.
No training framework is needed.

Example:
    After an export to ``output``::

        from dopt_api.formats import convert

        convert("output/quant_params.json", "onnx_qdq", "deploy")  # writes deploy/model.qdq.onnx
"""

from dopt_api.formats.writers import convert, format_names, get_format

__all__ = ["convert", "format_names", "get_format"]
