"""What our formats promise of error and size, for the quantizer kit."""

from pagedcore.testing.quantizer_case import QuantizerCase

CASES = {
    "fp8": QuantizerCase(
        settings={},
        max_error=0.03,
        max_bytes=1.1,
        lies=[{"quant_method": "fp8", "activation_scheme": "guessed"}],
    ),
}
