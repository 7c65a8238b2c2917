"""What Megatron-Core 0.16 imports from here and is not called."""

fused_compute_score_for_moe_aux_loss = fused_moe_aux_loss = fused_topk_with_score_function = None
