import { describe, expect, it } from "vitest";
import { layoutOf } from "../../ts/engines/onnx-layout.js";
import { type FakeSession, sessionOf } from "./onnx-sessions.js";

const LAYOUT = { kvHeads: 4, headSize: 16, dtype: "float16" } as const;
const names = (layers: number) =>
	Array.from({ length: layers }, (_, layer) => [`${layer}.key`, `${layer}.value`]).flat();

/** A session whose past_key_values.1.value is told to be another. */
function changed(change: Partial<FakeSession["inputMetadata"][number]>): FakeSession {
	const session = sessionOf(2, LAYOUT);
	const inputMetadata = session.inputMetadata.map((value) =>
		value.name === "past_key_values.1.value" ? { ...value, ...change } : value,
	);
	return { ...session, inputMetadata };
}

describe("the layout of KV tensors", () => {
	it("is read from the session, layers in the order of their numbers", () => {
		expect(layoutOf(sessionOf(12, LAYOUT), undefined)).toEqual({ ...LAYOUT, names: names(12) });
		expect(layoutOf(sessionOf(1, LAYOUT, ["num_logits_to_keep"]), LAYOUT)).toMatchObject(LAYOUT);
	});

	it("is the caller's where the session does not tell it", () => {
		const { inputMetadata: _, ...silent } = sessionOf(2, LAYOUT);
		expect(layoutOf(silent, LAYOUT)).toEqual({ ...LAYOUT, names: names(2) });
		expect(() => layoutOf(silent, undefined)).toThrow(
			expect.objectContaining({
				code: "IDENTITY_UNKNOWN",
				message: expect.stringMatching(/kvHeads.*`layout`/),
			}),
		);
		const shape = ["batch", "heads", "past", "size"];
		const symbolic = sessionOf(2, LAYOUT);
		const inputMetadata = symbolic.inputMetadata.map((value) => ({ ...value, shape }));
		expect(layoutOf({ ...symbolic, inputMetadata }, LAYOUT)).toMatchObject(LAYOUT);
		expect(() => layoutOf(sessionOf(2, LAYOUT), { ...LAYOUT, headSize: 8 })).toThrow(
			expect.objectContaining({
				code: "INVALID_ARGUMENT",
				message: expect.stringMatching(/headSize is 8.*16/),
			}),
		);
		expect(() => layoutOf(silent, { ...LAYOUT, kvHeads: 0 })).toThrow(/kvHeads/);
	});

	it.each<[string, FakeSession, RegExp]>([
		["no KV inputs", sessionOf(0, LAYOUT), /no inputs past_key_values/],
		["an encoder", sessionOf(2, LAYOUT, ["encoder_hidden_states"]), /encoder_hidden_states/],
		["images", sessionOf(2, LAYOUT, ["inputs_embeds"]), /inputs_embeds/],
		["convolutions", sessionOf(2, LAYOUT, ["past_conv.0"]), /past_conv\.0 is no state of keys/],
		["one tensor for both", sessionOf(1, LAYOUT, ["past_key_values.1.key_value"]), /key_value/],
		[
			"keys alone",
			{
				...sessionOf(1, LAYOUT, ["past_key_values.1.key"]),
				outputNames: sessionOf(2, LAYOUT).outputNames,
			},
			/no input past_key_values.1.value/,
		],
		["no outputs", { ...sessionOf(1, LAYOUT), outputNames: ["logits"] }, /no output present.0.key/],
		["tokens before heads", changed({ shape: ["batch", "past", 4, 16] }), /\[batch,past,4,16\]/],
		["keys across", changed({ shape: ["batch", 4, 16, "past"] }), /other orders/],
		["heads in the batch", changed({ shape: ["batch_x_heads", "past", 16] }), /\[batch_x_heads/],
		["a window of fixed size", changed({ shape: ["batch", 4, 512, 16] }), /fixed size/],
		["a fixed batch", changed({ shape: [2, 4, "past", 16] }), /batches of 2/],
		["bytes", changed({ type: "int8" }), /int8: float32 and float16/],
		["layers of several shapes", changed({ shape: ["batch", 4, "past", 32] }), /headSize of/],
	])("is refused by name: %s", (_name, session, reason) => {
		expect(() => layoutOf(session, undefined)).toThrow(
			expect.objectContaining({
				code: "UNSUPPORTED_MODEL",
				message: expect.stringMatching(reason),
			}),
		);
	});
});
