import { describe, expect, it } from "vitest";
import { Provenance } from "../../ts/engines/llama-provenance.js";
import type { EngineSequence } from "../../ts/engines/node-llama-cpp.js";

/** What node-llama-cpp's sequence tells: its tokens, and a meter that counts shifted tokens too. */
class Sequence {
	readonly contextSize = 100;
	contextTokens: number[] = [];
	readonly tokenMeter = { usedInputTokens: 0, usedOutputTokens: 0 };

	evaluate(...tokens: number[]): void {
		this.contextTokens = [...this.contextTokens, ...tokens];
		this.tokenMeter.usedInputTokens += tokens.length;
	}

	/** Erases tokens and moves those behind them. */
	erase(...ranges: [start: number, end: number][]): void {
		const erased = (i: number) => ranges.some(([start, end]) => i >= start && i < end);
		const [first] = ranges[0] ?? [0];
		this.contextTokens = this.contextTokens.filter((_, i) => !erased(i));
		this.tokenMeter.usedInputTokens += this.contextTokens.length - first;
	}
}

function sighted() {
	const sequence = new Sequence();
	const provenance = new Provenance();
	const look = (salt = "", chat = false) =>
		provenance.look(sequence as unknown as EngineSequence, salt, chat);
	look();
	return { sequence, provenance, look };
}

describe("what may be stored of a sequence", () => {
	it("is all of it, generated tokens included, when it only grew", () => {
		const { sequence, look } = sighted();
		sequence.evaluate(1, 2, 3);
		sequence.evaluate(4, 5);
		expect(look()).toEqual({ sound: 5, cached: 0 });
		sequence.evaluate(6);
		expect(look().sound).toBe(6);
	});

	it("is all of it after the end was erased and evaluated anew", () => {
		const { sequence, look } = sighted();
		sequence.evaluate(1, 2, 3, 4);
		look();
		sequence.erase([2, 4]);
		sequence.evaluate(7, 8, 9);
		expect(look().sound).toBe(5);
	});

	it("is nothing once tokens may have moved, be they the same as before", () => {
		for (const tokens of [
			[1, 2, 3, 4, 5, 6, 7],
			[1, 2, 2, 2, 2, 2, 2],
		]) {
			for (const seen of [0, 1, 4, 7]) {
				const { sequence, look } = sighted();
				sequence.evaluate(...tokens.slice(0, seen));
				look();
				sequence.evaluate(...tokens.slice(seen));
				sequence.erase([1, 3]);
				expect(look().sound).toBe(0);
				sequence.evaluate(...tokens.slice(5));
				expect(look().sound).toBe(0);
				sequence.erase([4, 7]);
				expect(look().sound).toBe(0);
			}
		}
	});

	it("is nothing where the meter adds up after a move of what was there before", () => {
		const { sequence, look } = sighted();
		sequence.evaluate(1, 2, 3, 4, 5, 6);
		look();
		sequence.erase([2, 4]); // [1, 2, 5, 6]: two tokens metered, two tokens behind the second
		sequence.evaluate(7, 8, 9);
		expect(look().sound).toBe(0);
		const other = sighted();
		other.sequence.evaluate(1, 2, 3, 4, 5, 6);
		other.look();
		other.sequence.erase([1, 2], [3, 4]); // [1, 3, 5, 6]: two pieces, side by side
		expect(other.look().sound).toBe(0);
	});

	it("is whole again once the sequence was empty", () => {
		const { sequence, look } = sighted();
		sequence.evaluate(1, 2, 3, 4, 5, 6);
		sequence.erase([2, 4]);
		expect(look().sound).toBe(0);
		sequence.erase([0, 4]);
		look();
		sequence.evaluate(1, 2, 3, 4);
		expect(look().sound).toBe(4);
	});

	it("is nothing when more was evaluated than is there, unless by a chat session", () => {
		for (const [chat, sound] of [
			[false, 0],
			[true, 5],
		] as const) {
			const { sequence, look } = sighted();
			sequence.evaluate(1, 2, 3, 4, 5);
			sequence.erase([4, 5]); // it takes back the end, and evaluates another
			sequence.evaluate(6);
			expect(look("", chat).sound).toBe(sound);
		}
	});

	it("is nothing where a chat session has used so much that the engine may have made room itself", () => {
		const { sequence, look } = sighted();
		sequence.evaluate(...Array<number>(98).fill(1));
		sequence.erase([97, 98]);
		sequence.evaluate(1);
		expect(look("", true).sound).toBe(0);
	});

	it("is nothing of a sequence that was used before, in ways unknown", () => {
		const sequence = new Sequence();
		sequence.evaluate(1, 2, 3, 4);
		sequence.erase([1, 2]);
		expect(new Provenance().look(sequence as unknown as EngineSequence, "").sound).toBe(0);
	});
});

describe("what the cache holds of a sequence", () => {
	it("is remembered for the same salt, as far as the tokens stay", () => {
		const { sequence, provenance, look } = sighted();
		sequence.evaluate(1, 2, 3, 4);
		look();
		provenance.markCached(sequence as unknown as EngineSequence, "", 4);
		expect(look().cached).toBe(4);
		sequence.erase([3, 4]);
		sequence.evaluate(9);
		expect(look().cached).toBe(3);
		expect(look("tenant").cached).toBe(0);
		expect(look().cached).toBe(0);
	});

	it("is all of it after a load", () => {
		const { sequence, provenance, look } = sighted();
		sequence.contextTokens = [1, 2, 3];
		provenance.markLoaded(sequence as unknown as EngineSequence, "");
		expect(look()).toEqual({ sound: 3, cached: 3 });
		sequence.evaluate(4);
		expect(look()).toEqual({ sound: 4, cached: 3 });
	});
});
