import inspect

import svqvae_hf.trainer


def test_public_names_exist_and_are_documented():
    for name in svqvae_hf.trainer.__all__:
        member = getattr(svqvae_hf.trainer, name)
        assert inspect.getdoc(member), name


def test_the_docstring_names_only_public_names():
    linked = set(svqvae_hf.trainer.__doc__.replace("`]", "[`").split("[`")[1::2])
    assert linked <= set(svqvae_hf.trainer.__all__)
    assert len(linked) > 20
