"""Names and limits that arguments and help say without torch are those of the engine."""

import radix_ops
import radix_ops_command
from radix_ops.data import kinds, streams
from radix_ops.engine import classifying, cross_encoders, inputs, label_prompts, pooling, quantising, templates
from radix_ops.engine.shapes.recognition import shapes_of
from radix_ops.plan import sharing
from radix_ops_command import names


def test_names_are_those_of_the_engine():
    assert radix_ops_command.__version__ == radix_ops.__version__
    assert streams.LONGEST_LINE == names.LONGEST_LINE
    assert inputs.LONGEST_TEXT == names.LONGEST_TEXT
    assert pooling.POOLINGS == names.POOLINGS
    assert quantising.OUTPUT_DTYPES == names.OUTPUT_DTYPES
    assert tuple(templates.TEMPLATES) == names.TEMPLATES
    assert tuple(label_prompts.LABEL_PROMPTS) == names.LABEL_PROMPTS
    assert classifying.PROBLEMS == names.PROBLEMS
    assert cross_encoders.READINGS == names.READINGS
    assert kinds.KINDS == names.KINDS
    for command, shapes in names.SHAPES.items():
        assert tuple(dict.fromkeys(shape.name for shape in shapes_of(command))) == shapes, command
    assert sharing.SEED == names.SEED
