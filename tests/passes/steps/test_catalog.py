import json

import pytest

from hasten.errors import UsageError
from hasten.passes.steps.catalog import canonical, entry, names, parse, read
from hasten.passes.steps.describe import describe
from hasten.passes.steps.policy import Policy

TEXTS = [
    "teacache:threshold=0.25,model=flux",
    "teacache:threshold=0.2,coefficients=1.5/-2e-3/0,sign=clamp0,fitted=0.4,first=3,last=0,signal=time-embedding",
    "first-block:threshold=0.1",
    "dbcache:head=8,foot=0,warmup=8,threshold=0.08,limit=3",
    "dbcache:mask=scm-fast,payload=taylor,order=2,branches=separate",
    "adacache:codebook=30-fast,moreg=true",
    "adacache:bounds=0.1/0.2,rates=3/2/1,moreg=true,window=4/20,strides=1/2,frames=15",
    "magcache:model=flux,threshold=0.24,limit=5,retention=0.1",
    "magcache:ratios=1/0.99/0.98,never=2",
    "easycache:threshold=0.05,warmup=5",
    "smoothcache:schedule=dit-50-0.18",
    "taylorseer:interval=4,order=1,warmup=3",
    "spectrum",
    "spectrum:flex=3,history=10,span=50",
    "meancache",
    "meancache:model=qwen-image,computed=10",
    "mask:1001",
    "mask:computed=0/2,steps=4,granularity=modules,modules=attn/mlp,payload=value",
    "mask:bits=1100,granularity=output,payload=fitted,history=2,weights=1.5/-0.5/2/-1",
    "mask:bits=1100,payload=chebyshev-residual",
    "teacache:threshold=0.2,coefficients=1/0,signal=time-embedding,times=1000/750/500/250",
    "deepcache:interval=3,level=1",
    "fora",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_request_reads_back_from_its_own_text(text):
    policy = parse(text)
    assert isinstance(policy, Policy)
    assert policy.name == text.partition(":")[0]
    assert parse(canonical(text)) == policy
    assert canonical(canonical(text)) == canonical(text)


@pytest.mark.parametrize("text", TEXTS)
def test_a_policy_in_words(text):
    lines = describe(parse(text)).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith(parse(text).name)


def test_what_the_words_say():
    assert describe(parse("dbcache:head=2,foot=1,limit=3,payload=taylor-residual,order=2")).splitlines() == [
        "dbcache: threshold 0.08, limit 3, at_threshold compute, retained first 8",
        "looks at: probe",
        "leaves out: all blocks but the first 2 and the last 1; returns: taylor (order 2, of residual)",
        "keeps: reference (like signal), count (int64), stored (3 x like after), calls (3 x int64)",
    ]


@pytest.mark.parametrize("name", names())
def test_every_policy_has_a_summary_and_says_what_its_options_mean(name):
    found = entry(name)
    assert found.summary
    assert all(option.meaning for option in found.options.values())


def test_no_two_parts_of_a_policy_share_a_state_name():
    for text in TEXTS:
        policy = parse(text)
        assert len(policy.slots()) == len(policy.decision.slots()) + len(policy.payload.slots())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("teacach:model=flux", r"no step-cache policy named 'teacach'.*Did you mean 'teacache'"),
        ("", "no step-cache policy named ''"),
        ("teacache:treshold=1", r"teacache has no option 'treshold'.*Did you mean 'threshold'"),
        ("teacache", "teacache needs a polynomial"),
        ("teacache:coefficients=1/0", "give threshold=NUMBER"),
        ("teacache:model=fluks", r"teacache: model: 'fluks' is none of.*Did you mean 'flux'"),
        ("teacache:model=flux,threshold=high", "teacache: threshold: 'high' is not a number"),
        ("teacache:model=flux,threshold=nan", "'nan' is not a number"),
        ("teacache:model=flux,threshold=-0.1", "-0.1 was given; it goes from 0"),
        ("teacache:coefficients=1//2,threshold=1", "'' is not numbers with '/' between them"),
        ("teacache:coefficients=,threshold=1", "option 'coefficients=' is not written key=value"),
        ("teacache:model=flux,strict=perhaps", "'perhaps' is not true or false"),
        ("teacache:model=flux,model=latte", "option 'model' is given twice"),
        ("teacache:flux", "option 'flux' is not written key=value"),
        ("teacache:model=flux,", "option '' is not written key=value"),
        ("dbcache:head=0", "0 was given; it goes from 1"),
        ("dbcache:head=1.5", "'1.5' is not a whole number"),
        ("dbcache:order=1", r"order: 1 was given, but payload=residual does not extrapolate"),
        ("dbcache:payload=taylor,order=9", "9 was given; it goes from 0 to 4"),
        ("dbcache:limit=-2", "-2 was given; it goes from -1"),
        ("magcache", "magcache needs magnitude ratios"),
        ("magcache:model=flux,retention=1.5", "1.5 was given; it goes from 0 to 1"),
        ("smoothcache", "smoothcache needs a mask"),
        ("meancache:computed=14", "z-image has no schedule that computes 14 steps; it has 25, 20, 17, 15, 13"),
        ("mask:bits=1001,payload=fitted", "needs 3 weights for each of 2 reused steps, and 0 were given in all"),
        ("mask:bits=1001,payload=fitted,history=1,weights=1/1/1", "needs 1 weights for each of 2 .*and 3 were given"),
        ("mask:bits=1001,weights=1/1", "mask: weights was given, and payload=residual has none; payload=fitted does"),
        ("mask:bits=1001,payload=fitted,history=1,weights=1/1,order=1", "order: 1 was given, but payload=fitted has"),
        ("mask:bits=11,payload=fitted,stretch=nearest", "weights for the steps of one run; leave stretch out"),
        ("mask:bits=1001,payload=fited", r"'fited' is none of.*Did you mean 'fitted'"),
        ("teacache:model=flux,times=1/0", "times were given, and the signal is modulated, which each run has of its"),
        ("fora:modules=attn//mlp", "is not words with '/' between them"),
    ],
)
def test_what_cannot_be_meant(text, message):
    with pytest.raises(UsageError, match=message):
        parse(text)


def test_a_calibration_file(tmp_path):
    path = tmp_path / "toy.json"
    options = {"coefficients": [2.0, -1, 0.5], "threshold": 0.2, "fitted": 0.3, "strict": False, "model": None}
    path.write_text(json.dumps({"policy": "teacache", "options": options, "model": "toy", "steps": 20, "r2": 0.9}))
    policy = parse(str(path))
    assert policy.decision.coefficients == (2.0, -1.0, 0.5)
    assert policy.decision.fitted == 0.3
    assert not policy.decision.strict
    # The text holds the numbers, so it outlives the file.
    text = canonical(str(path))
    path.unlink()
    assert parse(text) == policy


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", 'has no "policy"'),
        ('{"policy": 3}', 'has no "policy"'),
        ('{"policy": "teacache", "options": 3}', '"options" is 3; it must be an object'),
        ('{"policy": "teacache", "options": {"model": "flux", "threshold": true}}', "True is not a number"),
        ('{"policy": "teacache", "options": {"model": "flux", "limit": 1.5}}', "1.5 is not a whole number"),
        ('{"policy": "teacache", "options": {"coefficients": 3}}', "3 is not numbers"),
        ('{"policy": "teacache", "options": {"coefficients": ["a"], "threshold": 1}}', "'a' is not numbers"),
        ('{"policy": "teacache", "options": {"model": 3}}', "3 is not a word"),
        ('{"policy": "mask", "options": {"bits": 1001}}', "1001 is not a word"),
        ('{"policy": "teacash"}', "Did you mean 'teacache'"),
    ],
)
def test_files_that_cannot_be_meant(tmp_path, content, message):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=message):
        parse(str(path))
    with pytest.raises(UsageError, match=r"none\.json: No such file"):
        read(str(tmp_path / "none.json"))
