from flax_transformer.planning.hlo import Module, read_collectives


def test_without_an_annotation_the_condition_of_a_loop_gives_its_iterations():
    text = """HloModule step, replica_count=2, num_partitions=4
%body (p: (s32[])) -> (s32[]) {
  %r = f32[5]{0} all-reduce(%x), channel_id=1, to_apply=%add, backend_config={"estimated_cycles":"10"}
  %r2 = f32[5]{0} all-reduce(%x), channel_id=1, to_apply=%add
}
%condition (p: (s32[])) -> pred[] {
  %n = s32[]{:T(128)} constant(7)
}
%async (p: f32[5]) -> f32[9] {
  %g = (f32[5]{0}, bf16[9]{0}) all-gather-start(%x), channel_id=2
}
%async_end (p: f32[5]) -> f32[9] {
  %c = f32[9] custom-call(%p), custom_call_target="Inside"
  %g = (f32[5]{0}, bf16[9]{0}) all-gather-start(%x), channel_id=2
}
ENTRY %main (p: f32[5]) -> f32[5] {
  %s = (f32[3,2]{1,0}, f32[3,2]{1,0}, u32[], u32[]) collective-permute-start(%p), channel_id=3
  %d = f32[3,2]{1,0} collective-permute-done(%s)
  %u = f32[7]{0} collective-permute(%p), channel_id=4
  %v = bf16[3]{0} reduce-scatter(%p), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %x = bf16[3]{0} reduce-scatter(%p), channel_id=6, replica_groups=[4,2]<=[8], to_apply=%add
  %y = bf16[3]{0} reduce-scatter(%p), channel_id=7, to_apply=%add
  %z = ((bf16[6]{0}), bf16[3]{0}) reduce-scatter-start(%p), channel_id=8, replica_groups={{0,1}}, to_apply=%add
  %w = (s32[]) while(%t), condition=%condition, body=%body
  %f = f32[9] fusion(%p), kind=kCustom, calls=%async, backend_config={"estimated_cycles":"3"}
  %h = f32[9] fusion(%p), kind=kCustom, calls=%async_end
  %c = f32[9] custom-call(%p), custom_call_target="X64Combine"
  %b = f32[9] custom-call(), custom_call_target="AllocateBuffer"
}
"""
    module = Module(text)
    assert module.num_custom_calls == 1
    assert module.has_loops and module.cycles(loops=True) == 73 and module.cycles(loops=False) == 13
    assert {(each.kind, each.count, each.bytes) for each in read_collectives(module)} == {
        ("all-reduce", 14, 14 * 5 * 4),
        ("all-gather", 1, 9 * 2),
        ("collective-permute", 2, (6 + 7) * 4),
        ("reduce-scatter", 4, (4 + 2 + 8 + 2) * 3 * 2),
    }
