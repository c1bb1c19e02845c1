import type { EngineSequence } from "./node-llama-cpp.js";

type Tokens = readonly number[];

/** A sequence as it was when it was last looked at. */
interface Sighting {
	/** The tokens that it held. */
	readonly context: Tokens;
	/** How many of them, from the first, had state that was computed from exactly these tokens. */
	readonly sound: number;
	/** The tokens that its sequence's meter had counted. */
	readonly metered: number;
	/** How many leading tokens the cache holds, for tokens of this salt. */
	readonly cached: number;
	readonly salt: string;
}

const UNSEEN: Sighting = { context: [], sound: 0, metered: 0, cached: 0, salt: "" };

/**
 * Knows which of a sequence's tokens may be stored. A context shift erases tokens and moves those behind
 * them: their state still carries what was erased, so it belongs to no prefix that tokens could
 * name. The engine does not tell, and where tokens repeat, moved ones look like those that were there before. But
 * its token meter counts each evaluated and each moved token: where it counts as many as there are new ones, none moved.
 */
export class Provenance {
	readonly #sightings = new WeakMap<EngineSequence, Sighting>();

	/**
	 * Looks at a sequence, before or after evaluating.
	 *
	 * @param chat Whether nothing but a chat session has used it since the last look.
	 * @returns How many leading tokens may be stored, and how many of them the cache already holds.
	 */
	look(sequence: EngineSequence, salt: string, chat = false): { sound: number; cached: number } {
		const last = this.#sightings.get(sequence) ?? UNSEEN;
		const context = sequence.contextTokens;
		const kept = commonPrefix(context, last.context);
		const meter = metered(sequence);
		const count = meter - last.metered;
		const inPlace =
			allCounted(context, kept, count, last.context) ||
			(chat && last.context.length + count < sequence.contextSize - 1);
		const cached = last.salt === salt ? Math.min(last.cached, kept) : 0;
		const sound = inPlace ? soundTokens(context, kept, last.sound) : 0;
		this.#sightings.set(sequence, { context, sound, metered: meter, cached, salt });
		return { sound, cached };
	}

	/** Remembers that the cache holds the sequence's leading `tokens` tokens. */
	markCached(sequence: EngineSequence, salt: string, tokens: number): void {
		const last = this.#sightings.get(sequence) ?? UNSEEN;
		this.#sightings.set(sequence, { ...last, cached: tokens, salt });
	}

	/** Remembers that the sequence was filled from the cache, and with nothing else. */
	markLoaded(sequence: EngineSequence, salt: string): void {
		const context = sequence.contextTokens;
		const { length } = context;
		this.#sightings.set(sequence, {
			context,
			sound: length,
			metered: metered(sequence),
			cached: length,
			salt,
		});
	}
}

/** How much of `context` is sound where no token has moved. */
function soundTokens(context: Tokens, kept: number, before: number): number {
	return kept > before ? before : context.length;
}

/**
 * Whether each token behind `kept` was evaluated, once, and nothing else was. Each that moved was counted as well: then the first
 * of the new ones is one of those that stood behind.
 */
function allCounted(context: Tokens, kept: number, count: number, before: Tokens): boolean {
	const first = context[kept];
	return (
		count === context.length - kept &&
		(first === undefined || before.indexOf(first, kept + 1) === -1)
	);
}

function metered({ tokenMeter }: EngineSequence): number {
	return tokenMeter.usedInputTokens + tokenMeter.usedOutputTokens;
}

function commonPrefix(left: Tokens, right: Tokens): number {
	let length = 0;
	while (length < left.length && length < right.length && left[length] === right[length]) {
		length++;
	}
	return length;
}
