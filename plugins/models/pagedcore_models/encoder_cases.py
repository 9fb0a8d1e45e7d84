"""Encoders at a size that the kit of pooled models checks in no time; see `cases.py`."""

from pagedcore.testing.model_case import BEGIN, END, SIZES, ModelCase

ENCODER = {
    **SIZES,
    "max_position_embeddings": 64,
    "pad_token_id": 258,
    "num_labels": 3,
}
ROBERTA = {**ENCODER, "pad_token_id": 1, "type_vocab_size": 1, "max_position_embeddings": 66}
MODERN_BERT = {
    **ENCODER,
    "model_type": "modernbert",
    "cls_token_id": BEGIN,
    "sep_token_id": END,
    "local_attention": 8,
    "num_hidden_layers": 4,
}
CLASSIFIER = "AutoModelForSequenceClassification"

ENCODERS = {
    "BertModel": ModelCase(
        family="BERT: E5, GTE, BGE, MiniLM",
        config={**ENCODER, "model_type": "bert"},
        reference="AutoModel",
        task="embed",
    ),
    "BertForSequenceClassification": ModelCase(
        family="BERT with a classifier: rerankers such as MS MARCO MiniLM",
        config={**ENCODER, "model_type": "bert"},
        reference=CLASSIFIER,
        task="classify",
    ),
    "RobertaModel": ModelCase(
        family="RoBERTa",
        config={**ROBERTA, "model_type": "roberta"},
        reference="AutoModel",
        task="embed",
    ),
    "RobertaForSequenceClassification": ModelCase(
        family="RoBERTa with a classifier",
        config={**ROBERTA, "model_type": "roberta"},
        reference=CLASSIFIER,
        task="classify",
    ),
    "XLMRobertaModel": ModelCase(
        family="XLM-RoBERTa: multilingual E5, BGE-M3",
        config={**ROBERTA, "model_type": "xlm-roberta"},
        reference="AutoModel",
        task="embed",
    ),
    "XLMRobertaForSequenceClassification": ModelCase(
        family="XLM-RoBERTa with a classifier: rerankers such as BGE's",
        config={**ROBERTA, "model_type": "xlm-roberta"},
        reference=CLASSIFIER,
        task="classify",
    ),
    "ModernBertModel": ModelCase(
        family="ModernBERT",
        config=MODERN_BERT,
        variants={"biases": {"norm_bias": True, "attention_bias": True, "mlp_bias": True}},
        reference="AutoModel",
        task="embed",
        notes="every third layer sees all of a text, the others a window to both sides",
    ),
    "ModernBertForSequenceClassification": ModelCase(
        family="ModernBERT with a classifier",
        config=MODERN_BERT,
        variants={"of the mean": {"classifier_bias": True, "classifier_pooling": "mean"}},
        reference=CLASSIFIER,
        task="classify",
        notes="as ModernBertModel",
    ),
}
