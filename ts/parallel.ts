import { checkBoolean, checkInteger, checkOptions, invalid } from "./arguments.js";
import { brand } from "./brand.js";
import { wrap } from "./errors.js";
import { native } from "./native.js";
import type { NativeStrategy } from "./native-binding.js";

const U32_MAX = 2 ** 32 - 1;

/** How an engine is spread over workers, and which of them this is: {@link ParallelStrategy.of}. */
export interface ParallelStrategyOptions {
	/** Workers that share each layer. Default 1. */
	readonly tensorParallelSize?: number | undefined;
	/** Stages that share the layers. Default 1. */
	readonly pipelineParallelSize?: number | undefined;
	/** This worker: pipeline rank × tensorParallelSize + tensor-parallel rank. Default 0. */
	readonly rank?: number | undefined;
	/** Whether the model has multi-head latent attention. Default false. */
	readonly useMla?: boolean | undefined;
	/** Whether it has other kinds of KV too; such a model is stored as one without MLA. Default false. */
	readonly isHybrid?: boolean | undefined;
	/** Cache servers that the ranks are shared out to, a divisor of tensorParallelSize. Default 1. */
	readonly numServers?: number | undefined;
	/**
	 * Workers of a stage that share a chunk's tokens, a divisor of tensorParallelSize. Default 1.
	 */
	readonly decodeContextParallelSize?: number | undefined;
}

const OPTIONS = {
	tensorParallelSize: true,
	pipelineParallelSize: true,
	rank: true,
	useMla: true,
	isHybrid: true,
	numServers: true,
	decodeContextParallelSize: true,
} satisfies Record<keyof ParallelStrategyOptions, true>;

type Worker = {
	readonly [Name in keyof Omit<ParallelStrategyOptions, "isHybrid">]-?: NonNullable<
		ParallelStrategyOptions[Name]
	>;
};

/** Which piece of each chunk's KV a worker has, and whether it stores it. */
export class ParallelStrategy {
	/** Workers that share each layer. */
	readonly tensorParallelSize: number;
	/** Stages that share the layers. */
	readonly pipelineParallelSize: number;
	/** Workers of the engine. */
	readonly worldSize: number;
	/** This worker, from 0. */
	readonly rank: number;
	/** Whether all KV is MLA's: every worker of a stage has it whole. False for hybrid models. */
	readonly useMla: boolean;
	/** Cache servers that the ranks are shared out to. */
	readonly numServers: number;
	/** Workers of a stage that share a chunk's tokens. */
	readonly decodeContextParallelSize: number;
	/** Pieces that a chunk's KV has at one server. */
	readonly kvWorldSize: number;
	/** Which of them is this worker's, from 0. */
	readonly kvWorkerId: number;
	/**
	 * Workers that load one piece. Lookups lease it for so many: with fewer, the first to finish would end the
	 * lease of the others.
	 */
	readonly numKvReaders: number;
	/** Whether this is the first worker of its tensor-parallel group. */
	readonly isFirstRankOfTpGroup: boolean;
	/** Whether this worker stores its piece; under MLA, one of those that have the same piece does. */
	readonly storesKv: boolean;
	/** Workers of each server. */
	readonly ranksPerServer: number;
	/** This worker's server, from 0. */
	readonly serverIndex: number;
	/** The piece in LMCache's object keys. */
	readonly kvRank: number;

	private constructor(options: Worker) {
		const { tensorParallelSize, pipelineParallelSize, rank, useMla } = options;
		const { numServers, decodeContextParallelSize } = options;
		const numbers = {
			tensorParallelSize,
			pipelineParallelSize,
			rank,
			numServers,
			decodeContextParallelSize,
		};
		for (const [name, value] of Object.entries(numbers)) {
			checkInteger(name, value, name === "rank" ? 0 : 1, U32_MAX);
		}
		const strategy: NativeStrategy = wrap(() =>
			native().parallelStrategy(
				tensorParallelSize,
				pipelineParallelSize,
				rank,
				useMla,
				numServers,
				decodeContextParallelSize,
			),
		);
		this.tensorParallelSize = tensorParallelSize;
		this.pipelineParallelSize = pipelineParallelSize;
		this.worldSize = this.tensorParallelSize * this.pipelineParallelSize;
		this.rank = rank;
		this.useMla = useMla;
		this.numServers = numServers;
		this.decodeContextParallelSize = decodeContextParallelSize;
		this.kvWorldSize = strategy.kvWorldSize;
		this.kvWorkerId = strategy.kvWorkerId;
		this.numKvReaders = strategy.numKvReaders;
		this.isFirstRankOfTpGroup = strategy.firstOfGroup;
		this.storesKv = strategy.stores;
		this.ranksPerServer = strategy.ranksPerServer;
		this.serverIndex = strategy.server;
		this.kvRank = strategy.kvRank;
	}

	/**
	 * The strategy of one worker.
	 *
	 * @throws `INVALID_ARGUMENT` for a rank beyond the world, sizes below 1 or that do not divide each other,
	 * and more than 255 pieces.
	 */
	static of(options: ParallelStrategyOptions): ParallelStrategy {
		checkOptions("ParallelStrategy.of", options, OPTIONS);
		const { useMla = false, isHybrid = false } = options;
		for (const [name, value] of Object.entries({ useMla, isHybrid })) {
			checkBoolean(name, value);
		}
		const { tensorParallelSize = 1, pipelineParallelSize = 1, rank = 0 } = options;
		const { numServers = 1, decodeContextParallelSize = 1 } = options;
		return new ParallelStrategy({
			tensorParallelSize,
			pipelineParallelSize,
			rank,
			useMla: useMla && !isHybrid,
			numServers,
			decodeContextParallelSize,
		});
	}

	/** A single worker that has all KV. */
	static single(): ParallelStrategy {
		return ParallelStrategy.of({});
	}

	/** One worker of a tensor-parallel group. */
	static tensorParallel(size: number, rank: number, useMla = false): ParallelStrategy {
		checkInteger("rank", rank, 0, U32_MAX); // two of rank 0 would wait for another one's KV for ever
		return ParallelStrategy.of({ tensorParallelSize: size, rank, useMla });
	}

	/** One stage of a pipeline. */
	static pipelineParallel(size: number, rank: number): ParallelStrategy {
		checkInteger("rank", rank, 0, U32_MAX);
		return ParallelStrategy.of({ pipelineParallelSize: size, rank });
	}
}

brand(ParallelStrategy, "ParallelStrategy");

/** The former parameters: no MLA, and every rank stores. */
export interface LooseParallelism {
	/** @deprecated Give `parallelStrategy`. */
	readonly kvWorldSize: number;
	/** @deprecated Give `parallelStrategy`. */
	readonly kvWorkerId: number;
	/** Tokens of a block: needed with the former parameters. */
	readonly blockSize: number;
	/**
	 * Seconds that a server has to answer.
	 *
	 * @deprecated Give `timeoutMs`.
	 */
	readonly mqTimeout?: number | undefined;
	readonly parallelStrategy?: undefined;
}

/** The strategy itself; former parameters beside it must say the same. */
export interface WithParallelStrategy {
	readonly parallelStrategy: ParallelStrategy;
	/** @deprecated `parallelStrategy` says it. */
	readonly kvWorldSize?: number | undefined;
	/** @deprecated `parallelStrategy` says it. */
	readonly kvWorkerId?: number | undefined;
	readonly blockSize?: number | undefined;
}

/** What connectors and adapters take. Neither form: a single worker. */
export type ParallelismOptions =
	| WithParallelStrategy
	| LooseParallelism
	| {
			readonly parallelStrategy?: undefined;
			readonly kvWorldSize?: undefined;
			readonly kvWorkerId?: undefined;
	  };

/** Their names, in whichever form. */
export const PARALLELISM_OPTIONS = {
	parallelStrategy: true,
	kvWorldSize: true,
	kvWorkerId: true,
	blockSize: true,
	mqTimeout: true,
} satisfies Record<NamesOf<ParallelismOptions>, true>;

/** Of each form of a union. */
type NamesOf<Form> = Form extends unknown ? keyof Form : never;

/**
 * The strategy that options name, in its own form or in the former one.
 *
 * @throws `INVALID_ARGUMENT` when both forms are given and disagree, or the former one is not complete.
 */
export function strategyOf(options: ParallelismOptions): ParallelStrategy {
	const { parallelStrategy, kvWorldSize, kvWorkerId } = options;
	if (parallelStrategy !== undefined && !(parallelStrategy instanceof ParallelStrategy)) {
		throw invalid("parallelStrategy must be a ParallelStrategy: ParallelStrategy.of({ … })");
	}
	if (kvWorldSize === undefined && kvWorkerId === undefined) {
		return parallelStrategy ?? ParallelStrategy.single();
	}
	if (parallelStrategy !== undefined) {
		const { kvWorldSize: size, kvWorkerId: id } = parallelStrategy;
		if ((kvWorldSize ?? size) !== size || (kvWorkerId ?? id) !== id) {
			throw invalid(
				`kvWorldSize ${kvWorldSize} and kvWorkerId ${kvWorkerId} are not those of parallelStrategy, ` +
					`${size} and ${id}: leave them out`,
			);
		}
		return parallelStrategy;
	}
	const { blockSize } = options as Partial<LooseParallelism>;
	if (
		kvWorldSize === undefined ||
		kvWorkerId === undefined ||
		blockSize === undefined ||
		blockSize === null
	) {
		throw invalid(
			"kvWorldSize, kvWorkerId and blockSize go together: give all three, or a parallelStrategy instead",
		);
	}
	checkInteger("blockSize", blockSize, 1, U32_MAX);
	checkInteger("kvWorldSize", kvWorldSize, 1, U32_MAX);
	checkInteger("kvWorkerId", kvWorkerId, 0, kvWorldSize - 1);
	return ParallelStrategy.tensorParallel(kvWorldSize, kvWorkerId);
}
