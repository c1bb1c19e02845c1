import { describe, expect, it } from "vitest";
import { Provenance } from "../../ts/engines/llama-provenance.js";
import type { EngineSequence } from "../../ts/engines/node-llama-cpp.js";

/** What node-llama-cpp's sequence tells: its tokens, and a meter that counts shifted tokens too. */
class Sequence {
	contextTokens: number[] = [];
	readonly tokenMeter = { usedInputTokens: 0, usedOutputTokens: 0 };

	evaluate(...tokens: number[]): void {
		this.contextTokens = [...this.contextTokens, ...tokens];
		this.tokenMeter.usedInputTokens += tokens.length;
	}

	/** Erases tokens and moves those behind them. */
	erase(start: number, end: number): void {
		const shifted = this.contextTokens.slice(end);
		this.contextTokens = [...this.contextTokens.slice(0, start), ...shifted];
		this.tokenMeter.usedInputTokens += shifted.length;
	}
}

function sighted(announced: number[] = []) {
	const sequence = new Sequence();
	const provenance = new Provenance();
	const look = (tokens?: number[], salt = "") =>
		provenance.look(sequence as unknown as EngineSequence, salt, tokens);
	look(announced);
	return { sequence, provenance, look };
}

describe("what may be stored of a sequence", () => {
	it("is all of it, generated tokens included, when it only grew", () => {
		const { sequence, look } = sighted([1, 2, 3]);
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
		sequence.erase(2, 4);
		sequence.evaluate(7, 8, 9);
		expect(look().sound).toBe(5);
	});

	it("ends where a context shift began", () => {
		const { sequence, look } = sighted([1, 2, 3, 4, 5, 6]);
		sequence.evaluate(1, 2, 3, 4, 5, 6);
		sequence.erase(2, 4);
		expect(look().sound).toBe(2);
		sequence.evaluate(7, 8);
		expect(look().sound).toBe(2);
	});

	it("ends where a shift of what was there before began, however the meter adds up", () => {
		const { sequence, look } = sighted();
		sequence.evaluate(1, 2, 3, 4, 5, 6);
		look();
		sequence.erase(2, 4); // [1, 2, 5, 6]: two tokens metered, two tokens behind the second
		sequence.evaluate(7, 8, 9);
		expect(look().sound).toBe(2);
	});

	it("is found at once in long repetitions", () => {
		const { sequence, look } = sighted();
		const same = Array<number>(50_000).fill(1);
		const repeat = () => {
			for (let i = 0; i < 8; i++) {
				sequence.evaluate(...same);
			}
		};
		sequence.evaluate(0);
		repeat();
		sequence.evaluate(2);
		look();
		sequence.erase(0, sequence.contextTokens.length);
		repeat();
		sequence.evaluate(9);
		expect(look().sound).toBe(400_001);
	});

	it("is whole again once what was shifted is gone", () => {
		const { sequence, look } = sighted([1, 2, 3, 4, 5, 6]);
		sequence.evaluate(1, 2, 3, 4, 5, 6);
		sequence.erase(2, 4);
		look();
		sequence.erase(2, 4);
		look();
		sequence.evaluate(3, 4, 5, 6);
		expect(look().sound).toBe(6);
	});

	it("is the announced prompt when more was evaluated than is there", () => {
		const { sequence, look } = sighted([1, 2, 3]);
		sequence.evaluate(1, 2, 3, 4, 5);
		sequence.erase(4, 5); // a stop word, taken back
		expect(look().sound).toBe(3);
	});

	it("is nothing of a sequence that was used before, in ways unknown", () => {
		const sequence = new Sequence();
		sequence.evaluate(1, 2, 3, 4);
		sequence.erase(1, 2);
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
		sequence.erase(3, 4);
		sequence.evaluate(9);
		expect(look().cached).toBe(3);
		expect(look(undefined, "tenant").cached).toBe(0);
		expect(look().cached).toBe(0);
	});

	it("is all of it after a load", () => {
		const { sequence, provenance, look } = sighted();
		sequence.contextTokens = [1, 2, 3];
		provenance.markLoaded(sequence as unknown as EngineSequence, "", [1, 2, 3, 4]);
		expect(look()).toEqual({ sound: 3, cached: 3 });
		sequence.evaluate(4);
		expect(look()).toEqual({ sound: 4, cached: 3 });
	});
});
