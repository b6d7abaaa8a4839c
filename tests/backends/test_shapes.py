"""Shapes as text, profiles, symbolic sizes."""

import pytest

from hasten.backends.manifest import TensorSpec
from hasten.backends.shapes import Profile, check_profiles, evaluate, multiple, parse_profiles, parse_shapes
from hasten.errors import UsageError

WRITE = "; write x:1x4x64x64,t:1 or x:[1,4,64,64],t:[1]"


@pytest.mark.parametrize(
    ("text", "shapes"),
    [
        ("x:1x4x64x64,t:1", {"x": (1, 4, 64, 64), "t": (1,)}),
        ("x:[1,4,64,64],t:[1]", {"x": (1, 4, 64, 64), "t": (1,)}),
        ("x:[1, 4],t:2x3", {"x": (1, 4), "t": (2, 3)}),
        ("t:[]", {"t": ()}),
        ("input:0:1x4", {"input:0": (1, 4)}),
        ("a/b.c-d:7", {"a/b.c-d": (7,)}),
    ],
)
def test_reads_both_grammars(text, shapes):
    assert parse_shapes(text) == shapes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x:1xx4", "shapes 'x:1xx4': expected a whole number from 1 at position 5, found 'x'"),
        ("x:1x4x", "shapes 'x:1x4x': expected a whole number from 1 at position 7, found the end"),
        ("x:0x4", "shapes 'x:0x4': expected a whole number from 1 at position 3, found '0'"),
        ("x:-1", "shapes 'x:-1': expected a whole number from 1 at position 3, found '-'"),
        ("x:1 t", "shapes 'x:1 t': expected ',' at position 4, found ' '"),
        ("x", "shapes 'x': expected ':' after an input's name at position 2, found the end"),
        ("", "shapes '': expected ':' after an input's name at position 1, found the end"),
        (":1", "shapes ':1': expected an input's name at position 1, found ':'"),
        ("x:1,", "shapes 'x:1,': expected ':' after an input's name at position 5, found the end"),
        ("x:[1,4", "shapes 'x:[1,4': expected ',' or ']' at position 7, found the end"),
        ("x:[1 4]", "shapes 'x:[1 4]': expected ',' or ']' at position 5, found ' '"),
        ("x:[1,]", "shapes 'x:[1,]': expected a whole number from 1 at position 6, found ']'"),
        ("x:1,x:2", "shapes 'x:1,x:2': input 'x' is named twice at position 5, found 'x'"),
    ],
)
def test_message_points_at_the_position(text, message):
    with pytest.raises(UsageError) as caught:
        parse_shapes(text)
    assert str(caught.value) == message + WRITE
    assert caught.value.exit_code == 2


def test_one_shape_is_all_three_of_a_profile():
    assert parse_profiles("x:1x4") == {"x": Profile((1, 4), (1, 4), (1, 4))}
    assert parse_profiles({"x": (1, 4)}) == parse_profiles("x:1x4")
    assert parse_profiles(("x:1x4", {"x": [2, 4]}, "x:[8,4]")) == {"x": Profile((1, 4), (2, 4), (8, 4))}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (("x:1", "x:2"), "shapes: 2 given; give one, or three for min, opt and max"),
        (("x:1", "x:1,t:1", "x:1,t:1"), "shapes: min names x, opt names x, t; name the same inputs"),
        (("x:1", "x:1", "y:1"), "shapes: max names y, opt names x; name the same inputs"),
        (
            ("x:1x1", "x:1", "x:1x1"),
            "shapes: input 'x' has 2, 1, 2 dimensions in min, opt, max; give the same number",
        ),
        (("x:1x4", "x:9x4", "x:8x4"), "shapes: input 'x', dimension 0: min 1, opt 9, max 8 do not ascend"),
        ({"x": (1, 0)}, "shapes: input 'x' has shape (1, 0); sizes are whole numbers from 1"),
        ({"x": (1, 2.0)}, "shapes: input 'x' has shape (1, 2.0); sizes are whole numbers from 1"),
    ],
)
def test_message_for_profiles_that_cannot_be(shapes, message):
    with pytest.raises(UsageError) as caught:
        parse_profiles(shapes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ("sampel:1x4", "shapes: there is no input 'sampel'; inputs: sample, t. Did you mean 'sample'?"),
        ("sample:1", "shapes: input 'sample' has 2 dimensions (b, 4), 1 given"),
        ("sample:1x5", "shapes: input 'sample', dimension 1 is fixed to 4, 5 given"),
        (("sample:1x4", "sample:1x4", "sample:1x5"), "shapes: input 'sample', dimension 1 is fixed to 4, 5 given"),
    ],
)
def test_message_for_profiles_that_do_not_fit_the_model(shapes, message):
    inputs = (TensorSpec("sample", "float32", ("b", 4)), TensorSpec("t", "float32", (1,)))
    with pytest.raises(UsageError) as caught:
        check_profiles(parse_profiles(shapes), inputs)
    assert str(caught.value) == message
    check_profiles(parse_profiles(("sample:1x4", "sample:2x4", "sample:8x4")), inputs)


@pytest.mark.parametrize(
    ("dim", "size"),
    [
        (4, 4),
        ("h", 6),
        ("8*h", 48),
        ("h//2 + 1", 4),
        ("h % 4", 2),
        ("2*h**2", 72),
        ("h**9", None),
        ("w", None),
        ("h/2", None),
        ("__import__('os')", None),
        ("h +", None),
        ("h // 0", None),
    ],
)
def test_evaluates_plain_integer_arithmetic_and_nothing_else(dim, size):
    assert evaluate(dim, {"h": 6}) == size


def test_multiples_of_a_symbol():
    assert multiple("8*h") == (8, "h")
    assert [multiple(d) for d in (8, "h", "h*8", "8*h*w", "8*(h + 1)")] == [None] * 5
