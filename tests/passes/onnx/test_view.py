"""ONNX operators in the neutral vocabulary, at old and new opsets, and what is left unknown."""

import numpy as np
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper, parser

from hasten.errors import HastenError
from hasten.passes.onnx.graph import OnnxGraph


def view(body, opset=18, signature="float[2,4,6,8] x", initializers="", output="y", domains=""):
    header = f'<ir_version: 8, opset_import: ["" : {opset}{domains}]>'
    text = f"{header} g ({signature}) => ({output}) {initializers} {{ {body} }}"
    model = parser.parse_model(text)
    for value in model.graph.output:
        if not value.type.HasField("tensor_type"):
            value.type.tensor_type.elem_type = 1
    return next(iter(OnnxGraph(model).views()))


def read(*args, value="y", **kwargs):
    op = view(*args, **kwargs).op(value)
    return None if op is None else (op.name, op.inputs, dict(op.attrs))


CONTRIB = ', "com.microsoft" : 1'
I64 = "<int64[{n}] k = {{{values}}}>"


def ints(*values):
    return I64.format(n=len(values), values=",".join(map(str, values)))


@pytest.mark.parametrize(
    ("body", "wanted", "extra"),
    [
        ("y = Add (x, x)", ("add", ("x", "x"), {}), {}),
        ("y = Sum (x, x)", ("add", ("x", "x"), {}), {}),
        ("y = Sum (x, x, x)", None, {}),
        ("y = Reciprocal (x)", ("reciprocal", ("x",), {}), {}),
        ("a = Sqrt (x) y = Reciprocal (a)", ("rsqrt", ("x",), {}), {}),
        ("y = Identity (x)", ("identity", ("x",), {}), {}),
        ("y = Dropout (x)", ("identity", ("x",), {}), {}),
        ("y = Softmax (x)", ("softmax", ("x",), {"axis": 3}), {}),
        ("y = Softmax <axis = -2> (x)", ("softmax", ("x",), {"axis": 2}), {}),
        ("y = Softmax <axis = 3> (x)", ("softmax", ("x",), {"axis": 3}), {"opset": 12}),
        ("y = Softmax <axis = 1> (x)", None, {"opset": 12}),
        ("y = Softmax (x)", None, {"opset": 12}),
        ("y = Cast <to = 10> (x)", ("cast", ("x",), {"to": "float16"}), {}),
        ("y = Cast <to = 16> (x)", ("cast", ("x",), {"to": "bfloat16"}), {}),
        ("y = Cast <to = 1> (x)", ("identity", ("x",), {}), {}),
        ('y = Gelu <approximate = "tanh"> (x)', ("gelu", ("x",), {"approximate": "tanh"}), {"opset": 20}),
        ("y = com.microsoft.Gelu (x)", ("gelu", ("x",), {"approximate": "none"}), {"domains": CONTRIB}),
        ("y = com.microsoft.FastGelu (x)", ("gelu", ("x",), {"approximate": "tanh"}), {"domains": CONTRIB}),
        ("y = com.microsoft.FastGelu (x, x)", None, {"domains": CONTRIB}),
        ("y = com.microsoft.QuickGelu <alpha = 1.0> (x)", ("silu", ("x",), {}), {"domains": CONTRIB}),
        ("y = com.microsoft.QuickGelu <alpha = 2.0> (x)", None, {"domains": CONTRIB}),
        ("y = Swish (x)", ("silu", ("x",), {}), {"opset": 24}),
        ("y = Swish <alpha = 1.5> (x)", None, {"opset": 24}),
        ("y = ReduceMean <axes = [-1, 1]> (x)", ("mean", ("x",), {"axes": (1, 3), "keepdims": True}), {"opset": 17}),
        (
            "y = ReduceMean <keepdims = 0> (x, k)",
            ("mean", ("x",), {"axes": (2, 3), "keepdims": False}),
            {"initializers": ints(-1, 2)},
        ),
        ("y = ReduceSum (x)", ("sum", ("x",), {"axes": (0, 1, 2, 3), "keepdims": True}), {}),
        ("y = ReduceSum <noop_with_empty_axes = 1> (x)", ("identity", ("x",), {}), {}),
        ("y = ReduceMax <axes = [3]> (x)", ("max", ("x",), {"axes": (3,), "keepdims": True}), {"opset": 11}),
        ("y = Transpose (x)", ("transpose", ("x",), {"perm": (3, 2, 1, 0)}), {}),
        ("y = Transpose <perm = [0, 1, 2, 3]> (x)", ("identity", ("x",), {}), {}),
        ("y = Reshape (x, k)", ("reshape", ("x",), {}), {"initializers": ints(2, 24, 8)}),
        ("y = Reshape (x, k)", ("identity", ("x",), {}), {"initializers": ints(0, 0, -1, 8)}),
        ("y = Flatten <axis = 2> (x)", ("reshape", ("x",), {}), {}),
        ("y = Unsqueeze (x, k)", ("reshape", ("x",), {}), {"initializers": ints(0)}),
        ("y = Unsqueeze <axes = [0]> (x)", ("reshape", ("x",), {}), {"opset": 11}),
        ("y = Expand (x, k)", ("expand", ("x",), {}), {"initializers": ints(3, 1, 1, 1, 1)}),
        ("y = Expand (x, k)", ("identity", ("x",), {}), {"initializers": ints(1)}),
        ("y = Tile (x, k)", None, {"initializers": ints(1, 1, 2, 1)}),
        ("y = Tile (x, k)", ("identity", ("x",), {}), {"initializers": ints(1, 1, 1, 1)}),
        (
            "z, y = Split <axis = -1, num_outputs = 2> (x)",
            ("part", ("x",), {"axis": 3, "index": 1, "parts": 2}),
            {},
        ),
        ("z, y = Split <axis = 3> (x)", ("part", ("x",), {"axis": 3, "index": 1, "parts": 2}), {"opset": 13}),
        (
            "z, y = Split <axis = 3> (x, k)",
            ("part", ("x",), {"axis": 3, "index": 1, "parts": 2}),
            {"initializers": ints(4, 4)},
        ),
        ("z, y = Split <axis = 3> (x, k)", None, {"initializers": ints(3, 5)}),
        (
            "z, y = Split <axis = 3, split = [4, 4]> (x)",
            ("part", ("x",), {"axis": 3, "index": 1, "parts": 2}),
            {"opset": 11},
        ),
        ("y = Einsum <equation = \"b h i d, b h j d -> b h i j\"> (x, x)",
         ("einsum", ("x", "x"), {"equation": "bhid,bhjd->bhij"}), {}),
        ("y = Pad (x, k)", ("pad", ("x",), {"pads": (1, 1, 1, 1), "value": 0.0}),
         {"initializers": ints(0, 0, 1, 1, 0, 0, 1, 1)}),
        ("y = Pad (x, k)", ("pad", ("x",), {"pads": (2, 4, 1, 3), "value": 0.0}),
         {"initializers": ints(0, 0, 1, 2, 0, 0, 3, 4)}),
        ("y = Pad (x, k)", ("identity", ("x",), {}), {"initializers": ints(0, 0, 0, 0, 0, 0, 0, 0)}),
        ("y = Pad <mode = \"reflect\"> (x, k)", None, {"initializers": ints(0, 0, 1, 1, 0, 0, 1, 1)}),
        ("y = Acme (x)", None, {}),
        ("y = InstanceNormalization <epsilon = 0.5> (x, w, w)", ("instance_norm", ("x", "w", "w"), {"eps": 0.5}),
         {"signature": "float[2,4,6,8] x, float[4] w"}),
    ],
)  # fmt: skip
def test_reads(body, wanted, extra):
    assert read(body, **extra) == wanted


def slice_of(start, end, step=1, axis=-1):
    values = f"<int64[1] s = {{{start}}}, int64[1] e = {{{end}}}, int64[1] a = {{{axis}}}, int64[1] t = {{{step}}}>"
    return read("y = Slice (x, s, e, a, t)", initializers=values)


def test_slices_are_parts_where_they_are_whole_ones():
    assert slice_of(0, 4) == ("part", ("x",), {"axis": 3, "index": 0, "parts": 2})
    assert slice_of(4, 2**62) == ("part", ("x",), {"axis": 3, "index": 1, "parts": 2})
    assert slice_of(-4, 8) == ("part", ("x",), {"axis": 3, "index": 1, "parts": 2})
    assert slice_of(2, 4, axis=2) == ("part", ("x",), {"axis": 2, "index": 1, "parts": 3})
    assert slice_of(0, 2**62) == ("identity", ("x",), {})
    assert slice_of(0, 5) is None
    assert slice_of(2, 6) is None
    assert slice_of(0, 8, step=2) is None


CONV = "float[1,4,{h},8] x, float[6,4,{k},{k}] w, float[6] b"


@pytest.mark.parametrize(
    ("attrs", "height", "kernel", "padding"),
    [
        ("pads = [1, 1, 1, 1]", 8, 3, (1, 1, 1, 1)),
        ("pads = [0, 1, 2, 3]", 8, 3, (0, 1, 2, 3)),
        ('auto_pad = "VALID"', 8, 3, (0, 0, 0, 0)),
        ('auto_pad = "SAME_UPPER"', 8, 3, (1, 1, 1, 1)),
        ('auto_pad = "SAME_UPPER", strides = [2, 2]', 8, 3, (0, 0, 1, 1)),
        ('auto_pad = "SAME_LOWER", strides = [2, 2]', 8, 3, (1, 1, 0, 0)),
        ('auto_pad = "SAME_UPPER"', '"H"', 3, (1, 1, 1, 1)),
    ],
)
def test_convolutions(attrs, height, kernel, padding):
    signature = CONV.format(h=str(height).strip('"'), k=kernel)
    name, inputs, got = read(f"y = Conv <{attrs}> (x, w, b)", signature=signature)
    assert (name, inputs, got["padding"], got["groups"]) == ("conv2d", ("x", "w", "b"), padding, 1)


def test_same_padding_with_a_stride_needs_static_sizes():
    signature = CONV.format(h="H", k=3)
    assert read('y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w, b)', signature=signature) is None


MODES = [
    (mode, rounding)
    for mode in ("asymmetric", "half_pixel", "pytorch_half_pixel", "half_pixel_symmetric", "align_corners")
    for rounding in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
]


@pytest.mark.parametrize(("mode", "rounding"), MODES)
@pytest.mark.parametrize("factor", [2, 3])
def test_resize_is_nearest_upsampling_only_where_it_repeats_pixels(mode, rounding, factor):
    attrs = f'mode = "nearest", coordinate_transformation_mode = "{mode}", nearest_mode = "{rounding}"'
    opset = 19 if mode == "half_pixel_symmetric" else 18
    scales = f"<float[4] s = {{1.0, 1.0, {factor}.0, {factor}.0}}>"
    got = read(f"y = Resize <{attrs}> (x, , s)", opset=opset, initializers=scales)
    text = (
        f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[2,4,6,8] x) => (float[2,4,H,W] y) {scales} '
        f"{{ y = Resize <{attrs}> (x, , s) }}"
    )
    x = np.random.default_rng(0).standard_normal((2, 4, 6, 8)).astype(np.float32)
    session = ort.InferenceSession(parser.parse_model(text).SerializeToString(), providers=["CPUExecutionProvider"])
    repeated = x.repeat(factor, axis=2).repeat(factor, axis=3)
    exact = np.array_equal(session.run(None, {"x": x})[0], repeated)
    if got is not None:
        assert got == ("upsample_nearest", ("x",), {"scale": (factor, factor)})
        assert exact
    elif mode != "align_corners" and factor == 2:
        assert not exact


def test_resize_by_sizes():
    sizes = "<int64[4] z = {2, 4, 12, 16}>"
    attrs = 'mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"'
    body = f"y = Resize <{attrs}> (x, , , z)"
    assert read(body, initializers=sizes) == ("upsample_nearest", ("x",), {"scale": (2, 2)})


def test_group_normalization_18_is_read_per_channel():
    body = "y = GroupNormalization <num_groups = 2> (x, s, b)"
    values = "<float[2] s = {1.0, 2.0}, float[2] b = {3.0, 4.0}>"
    seen = view(body, opset=18, initializers=values)
    op = seen.op("y")
    assert op.name == "group_norm"
    assert seen.constant(op.inputs[1]).tolist() == [1, 1, 2, 2]
    assert seen.constant(op.inputs[2]).tolist() == [3, 3, 4, 4]
    assert seen.op("y").inputs == op.inputs
    # Scale and bias that come from outside cannot be repeated in reading.
    assert read(body, opset=18, signature="float[2,4,6,8] x, float[2] s, float[2] b") is None


def test_group_normalization_21():
    body = "y = GroupNormalization <num_groups = 2, epsilon = 0.25> (x, s, b)"
    got = read(body, opset=21, signature="float[2,4,6,8] x, float[4] s, float[4] b")
    assert got == ("group_norm", ("x", "s", "b"), {"groups": 2, "eps": 0.25})


QKV = "float[2,4,6,8] q, float[2,4,5,8] k, float[2,4,5,3] v"


@pytest.mark.parametrize("opset", [23, 24])
def test_attention(opset):
    assert read("y = Attention <is_causal = 1> (q, k, v)", opset=opset, signature=QKV) == (
        "sdpa",
        ("q", "k", "v", None),
        {"scale": None, "causal": True, "gqa": False},
    )


@pytest.mark.parametrize(
    "body",
    [
        "y = Attention <softcap = 2.0> (q, k, v)",
        "y = Attention <softmax_precision = 11> (q, k, v)",
        "y, a, b = Attention (q, k, v, , k, v)",
        "y, , , y2 = Attention (q, k, v)",
    ],
    ids=["softcap", "float64-softmax", "cache", "scores-read"],
)
def test_attention_with_more_to_it_is_left_alone(body):
    assert read(body, opset=23, signature=QKV, output="y, y2" if "y2" in body else "y") is None


def test_a_narrow_mask_is_padded_by_opset_24_and_therefore_left_alone():
    signature = QKV + ", bool[6,4] m"
    assert read("y = Attention (q, k, v, m)", opset=24, signature=signature) is None


def test_repeated_heads_are_one_repeat():
    values = "<int64[1] a = {2}, int64[5] e = {2, 4, 3, 6, 8}, int64[4] r = {2, 12, 6, 8}>"
    body = "u = Unsqueeze (x, a) w = Expand (u, e) y = Reshape (w, r)"
    assert read(body, initializers=values) == ("repeat", ("x",), {"axis": 1, "times": 3})
    # Repeating whole heads after one another is another order.
    values = "<int64[1] a = {1}, int64[5] e = {2, 3, 4, 6, 8}, int64[4] r = {2, 12, 6, 8}>"
    assert read(body, initializers=values) == ("reshape", ("w",), {})


def test_constant_choices_and_zero_sums_are_identities():
    false = "<bool[1] c = {0}, float z = {0.0}>"
    assert read("y = Where (c, z, x)", initializers=false) == ("identity", ("x",), {})
    assert read("y = Where (c, x, z)", initializers=false) == ("where", ("c", "x", "z"), {})
    assert read("y = Add (x, z)", initializers=false) == ("identity", ("x",), {})
    assert read("y = Add (z, x)", initializers=false) == ("identity", ("x",), {})


class TestConstants:
    def content(self, body, value="k", **kwargs):
        return view(f"{body} y = Relu (x)", **kwargs).constant(value)

    def test_shape_arithmetic_over_static_sizes(self):
        body = "s = Shape (x) i = Constant <value = int64[1] {1}> () d = Gather (s, i)"
        body += " two = Constant <value = int64[1] {2}> () k = Div (d, two)"
        assert self.content(body).tolist() == [2]

    def test_static_sizes_of_a_map_with_symbolic_ones(self):
        body = "s = Shape (x) i = Constant <value = int64 {1}> () k = Gather (s, i)"
        assert self.content(body, signature="float[B,4,H,8] x") == 4
        body = "s = Shape <start = 1> (x) i = Constant <value = int64 {1}> () k = Gather (s, i)"
        assert self.content(body, signature="float[B,4,H,8] x") is None

    def test_what_depends_on_an_input_is_no_constant(self):
        assert self.content("k = Add (x, x)") is None
        assert self.content("k = RandomNormal <shape = [2]> ()") is None

    def test_bfloat16(self):
        body = "c = Constant <value = float {1.5}> () b = Cast <to = 16> (c) k = Mul (b, b)"
        got = self.content(body)
        assert (got.dtype.name, float(got)) == ("bfloat16", 2.25)

    def test_nothing_huge_is_computed(self):
        body = "n = Constant <value = int64[1] {100000000000}> () k = ConstantOfShape (n)"
        assert self.content(body) is None
        zero = "z = Constant <value = int64 {0}> () n = Constant <value = int64 {100000000000}> ()"
        assert self.content(f"{zero} one = Constant <value = int64 {{1}}> () k = Range (z, n, one)") is None

    def test_a_long_chain_does_not_exhaust_the_stack(self):
        nodes = [helper.make_node("Add", [f"c{i}", "c0"], [f"c{i + 1}"]) for i in range(3000)]
        nodes.append(helper.make_node("Mul", ["x", "c3000"], ["y"]))
        info = helper.make_tensor_value_info("x", 1, [1])
        weight = numpy_helper.from_array(np.ones(1, dtype=np.float32), "c0")
        graph = helper.make_graph(nodes, "g", [info], [helper.make_tensor_value_info("y", 1, [1])], [weight])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        assert next(iter(OnnxGraph(model).views())).constant("c3000").tolist() == [3001]


class TestWriting:
    @pytest.mark.parametrize("opset", [11, 13, 18, 21, 23])
    def test_every_plain_operator_runs(self, opset):
        seen = view("y = Relu (x)", opset=opset)
        half = seen.emit_constant(np.asarray(0.5, dtype=np.float32), at="y")
        a = seen.emit("mul", ["x", half], {}, at="y")
        a = seen.emit(
            "sub", [seen.emit("add", [a, half], {}, at="y"), seen.emit("div", ["x", half], {}, at="y")], {}, at="y"
        )
        yes = seen.emit("cast", [a], {"to": "bool"}, at="y")
        no = seen.emit("logical_not", [yes], {}, at="y")
        both = seen.emit("logical_or", [seen.emit("logical_and", [yes, no], {}, at="y"), yes], {}, at="y")
        some = seen.emit("any", [both], {"axes": (3,), "keepdims": True}, at="y")
        a = seen.emit("where", [some, a, half], {}, at="y")
        a = seen.emit("transpose", [a], {"perm": (0, 2, 1, 3)}, at="y")
        a = seen.emit("squeeze", [seen.emit("unsqueeze", [a], {"axes": (0,)}, at="y")], {"axes": (0,)}, at="y")
        a = seen.emit("reshape", [a], {"shape": (2, -1, 8)}, at="y")
        assert seen.shape(a) == (2, 24, 8)
        assert seen.dtype(some) == "bool"
        a = seen.emit("reshape", [a], {"shape": (2, 4, 6, 8)}, at="y")
        seen.substitute("y", a)
        seen.owner.clean()
        seen.owner.check()
        model = seen.owner.to_model()
        x = np.random.default_rng(0).standard_normal((2, 4, 6, 8)).astype(np.float32)
        got = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        wanted = (x * 0.5 + 0.5 - x / 0.5).transpose(0, 2, 1, 3).reshape(2, 4, 6, 8)
        np.testing.assert_allclose(got, wanted, atol=1e-6)

    def test_transposes_of_transposes_are_one_or_none(self):
        seen = view("y = Relu (x)")
        once = seen.emit("transpose", ["x"], {"perm": (0, 2, 1, 3)}, at="y")
        twice = seen.emit("transpose", [once], {"perm": (0, 1, 3, 2)}, at="y")
        assert seen.op(twice).inputs == ("x",)
        assert seen.op(twice).attrs == {"perm": (0, 2, 3, 1)}
        assert seen.emit("transpose", [once], {"perm": (0, 2, 1, 3)}, at="y") == "x"

    def test_what_is_emitted_counts_as_no_user_before_it_is_used(self):
        seen = view("a = Relu (x) y = Neg (a)")
        assert seen.uses("a") == 1
        new = seen.emit("mul", ["a", "a"], {}, at="y")
        assert seen.uses("a") == 1
        seen.substitute("y", new)
        assert seen.uses("a") == 2

    def test_an_unknown_operator_is_refused(self):
        with pytest.raises(HastenError) as error:
            view("y = Relu (x)").emit("warp", ["x"], {}, at="y")
        assert str(error.value) == "the ONNX view cannot emit neutral operator 'warp'"


def test_a_transpose_with_batch_and_heads_merged_is_a_transpose_of_four_axes():
    values = "<int64[3] f = {8, 6, 8}, int64[4] r = {2, 4, 8, 6}, int64[4] other = {4, 2, 8, 6}>"
    body = "a = Reshape (x, f) b = Transpose <perm = [0, 2, 1]> (a) y = Reshape (b, r)"
    assert read(body, initializers=values) == ("transpose", ("x",), {"perm": (0, 1, 3, 2)})
    assert read(body.replace("(b, r)", "(b, other)"), initializers=values) == ("reshape", ("b",), {})
