"""The models that are looked at: by package and name, each at its published size."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from benchmarks.coverage import written
from benchmarks.coverage.build import (
    Build,
    adapter,
    causal,
    classifier,
    configured,
    detector,
    diffusion,
    graph_net,
    image_model,
    masked,
    translator,
    vision,
)

LLAMA = causal("llama")

MODELS: Mapping[str, Mapping[str, Build]] = {
    "torch": {
        "Transformer": nn.Transformer,
        "U-Net": written.unet,
        "DCGAN generator": written.dcgan_generator,
        "SNGAN discriminator": written.sngan_discriminator,
        "LSTM language model": written.lstm_language_model,
        "Deep Speech 2": written.deep_speech_2,
        "TCN": written.temporal_convolutions,
        "PointNet": written.point_net,
        "DLRM": written.dlrm,
    },
    "torchvision": {
        **{
            name: vision(name)
            for name in (
                "vit_b_16", "swin_t", "resnet18", "resnet50", "resnext50_32x4d", "densenet121",
                "efficientnet_b0", "efficientnet_v2_s", "alexnet", "vgg16", "mobilenet_v2",
                "mobilenet_v3_large", "convnext_tiny", "maxvit_t",
                "r3d_18", "s3d", "mvit_v2_s", "swin3d_t", "raft_large",
            )
        },
        "inception_v3": vision("inception_v3", init_weights=False),
        **{
            name: detector(name)
            for name in (
                "deeplabv3_resnet50", "maskrcnn_resnet50_fpn",
                "ssd300_vgg16",
            )
        },
    },
    "timm": {
        name: image_model(name)
        for name in (
            "beit_base_patch16_224", "eva02_base_patch14_224", "mixer_b16_224", "regnety_032",
            "resnetv2_50x1_bit", "dm_nfnet_f0", "mobilenetv3_large_100", "deit_small_patch16_224",
            "vit_base_patch16_224", "vit_base_patch14_dinov2", "swin_tiny_patch4_window7_224",
            "swinv2_tiny_window8_256", "resnest50d", "convnext_base",
            "convnextv2_base", "convmixer_768_32", "coatnet_0_rw_224", "cait_s24_224",
            "xcit_small_12_p16_224", "mobilevit_s",
            "hrnet_w18", "ghostnet_100",
        )
    },
    "transformers": {
        "GPT-2": causal("gpt2"),
        "BERT base": masked("bert"),
        "Gemma 7B": causal("gemma"),
        "Qwen2 0.5B": causal(
            "qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864,
            num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        "T5 small": translator("t5"),
        "Whisper tiny": configured("AutoModelForSpeechSeq2Seq", "whisper"),
        "Mixtral 8x7B": causal("mixtral"),
        "Qwen1.5-MoE A2.7B": causal("qwen2_moe"),
        "Falcon 7B": causal("falcon"),
        "Mamba 130M": causal("mamba", num_hidden_layers=24),
        "Llama 7B": LLAMA,
        "Llama 3.2 1B": causal(
            "llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192,
            num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8,
            tie_word_embeddings=True,
        ),
        "Mistral 7B": causal("mistral"),
        "Gemma 2 2B": causal("gemma2"),
        "Qwen3 0.6B": causal(
            "qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072,
            num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
            tie_word_embeddings=True,
        ),
        "Qwen3 30B-A3B": causal(
            "qwen3_moe", num_hidden_layers=48, num_key_value_heads=4, head_dim=128,
        ),
        "OLMoE 7B": causal("olmoe", intermediate_size=1024),
        "DeepSeek V3": causal("deepseek_v3"),
        "gpt-oss 120B": causal("gpt_oss"),
        "Phi-3 mini": causal("phi3"),
        "GPT-J 6B": causal("gptj"),
        "OPT 125M": causal("opt"),
        "Bloom 560M": causal("bloom", vocab_size=250880, hidden_size=1024, n_layer=24, n_head=16),
        "RWKV-4 7B": causal("rwkv"),
        "XLNet large": causal("xlnet"),
        "RoBERTa base": masked(
            "roberta", vocab_size=50265, max_position_embeddings=514, type_vocab_size=1
        ),
        "ALBERT xxlarge": masked("albert"),
        "DistilBERT": masked("distilbert"),
        "ModernBERT base": masked("modernbert"),
        "SqueezeBERT": masked("squeezebert"),
        "BART large": translator("bart"),
        "wav2vec 2.0 base": configured("Wav2Vec2ForPreTraining", "wav2vec2"),
        "EnCodec 24 kHz": configured("EncodecModel", "encodec"),
        "MMS-TTS (VITS)": configured("VitsModel", "vits"),
        "AST": configured("AutoModelForAudioClassification", "audio-spectrogram-transformer"),
        "ViT base": classifier("vit", num_labels=1000),
        "ViT-MAE base": configured("ViTMAEForPreTraining", "vit_mae"),
        "SegFormer B0": configured("SegformerForSemanticSegmentation", "segformer"),
        "DETR ResNet-50": configured(
            "AutoModelForObjectDetection", "detr", use_timm_backbone=True,
            use_pretrained_backbone=False,
        ),
        "SAM base": configured("SamModel", "sam"),
        "CLIP ViT-B/32": configured("CLIPModel", "clip"),
    },
    "diffusers": {
        "Stable Diffusion 1.5 U-Net": diffusion("UNet2DConditionModel", cross_attention_dim=768),
        "Stable Diffusion VAE": diffusion(
            "AutoencoderKL", block_out_channels=(128, 256, 512, 512), layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        ),
        "DiT-XL/2": diffusion("DiTTransformer2DModel", out_channels=8),
        "Stable Diffusion 3": diffusion(
            "SD3Transformer2DModel", num_layers=24, num_attention_heads=24,
            caption_projection_dim=1536, pos_embed_max_size=192, out_channels=16,
        ),
        "FLUX.1": diffusion("FluxTransformer2DModel", guidance_embeds=True),
        "CogVideoX VAE": diffusion("AutoencoderKLCogVideoX"),
    },
    "torch_geometric": {
        "GCN (Cora)": graph_net("GCN", 1433, 16, 2, 7),
        "GAT (Cora)": graph_net("GAT", 1433, 64, 2, 7, heads=8),
        "GraphSAGE (Reddit)": graph_net("GraphSAGE", 602, 256, 2, 41),
        "GIN": graph_net("GIN", 7, 64, 5, 2),
        "SchNet": graph_net("SchNet"),
        "LightGCN (Gowalla)": graph_net("LightGCN", 70839, 64, 3),
    },
    "peft": {
        "LoRA of Llama 7B": adapter(LLAMA, "q_proj", "v_proj"),
        "DoRA of Llama 7B": adapter(LLAMA, "q_proj", "v_proj", use_dora=True),
        "LoRA of GPT-2": adapter(causal("gpt2"), "c_attn", fan_in_fan_out=True),
    },
}  # fmt: skip
