/**
 * KV-cache offloading for LLM engines in Node.js.
 *
 * @packageDocumentation
 */
export {
	PrefixCache,
	type PrefixCacheOptions,
	PrefixHit,
	type RequestOptions,
	type StoreResult,
} from "./cache.js";
export { Client, type ClientOptions } from "./client.js";
export {
	type ConnectorFactory,
	type ConnectorLoader,
	type ConnectorRegistry,
	createConnector,
	type KvOffloadingBackend,
	type KvRole,
	type KvTransferConfig,
	type OffloadingOptions,
	type ResolvedKvTransferConfig,
	type ResolvedOffloading,
	resolveOffloading,
} from "./config.js";
export type {
	BlockAllocation,
	KvArray,
	KvCacheLayout,
	KvIpcHandle,
	KvPointer,
	LayerKv,
	SaltOption,
	SchedulerAdapter,
	WorkerAdapter,
} from "./connector/adapter.js";
export {
	type CacheAdapterOptions,
	type CacheSchedulerAdapter,
	type CacheWorkerAdapter,
	createSchedulerAdapter,
	createWorkerAdapter,
} from "./connector/cache-adapter.js";
export type { ConnectorMetadata, LoadStoreOp, RequestMetadata } from "./connector/metadata.js";
export { KvConnectors, type PagedEngine } from "./connector/offloading.js";
export {
	type CachedRequest,
	type ConnectorOutput,
	type EngineRequest,
	SchedulerConnector,
	type SchedulerConnectorOptions,
	type SchedulerOutput,
} from "./connector/scheduler.js";
export { WorkerConnector, type WorkerConnectorOptions } from "./connector/worker.js";
export { type ErrorCode, ErrorCodes, KvferryError } from "./errors.js";
export type { EventsOptions, KvEvent, KvEvents } from "./events.js";
export {
	type BlockAlgorithm,
	BlockHasher,
	type BlockHasherOptions,
	blockHashes,
	type ChunkAlgorithm,
	ChunkHasher,
	type ChunkHasherOptions,
	chunkHashes,
	eventHash,
	Hashes,
	type Lora,
	type MmFeature,
	type ObjectKeyFields,
	objectKey,
	type PromptEmbeds,
	packGroupId,
	type Tokens,
	unpackGroupId,
} from "./hash.js";
export {
	type LooseParallelism,
	type ParallelismOptions,
	ParallelStrategy,
	type ParallelStrategyOptions,
	strategyOf,
	type WithParallelStrategy,
} from "./parallel.js";
export {
	type HashList,
	type InsertResult,
	PrefixIndex,
	type PrefixIndexOptions,
} from "./prefix-index.js";
export {
	type EndedLoad,
	type FailedRecving,
	handleFailedRecving,
	handleInvalidBlocks,
	type InvalidBlocksRecovery,
	type InvalidBlocksStep,
	type KvLoadFailurePolicy,
	type LoadedRequest,
	type LoadFailures,
	type RecoveryRequest,
	updateWaitingForRemoteKv,
} from "./recovery.js";
export { type EvictionPolicy, Server, type ServerOptions, type Status } from "./server.js";
export type { TokenOptions } from "./token.js";
export {
	type BlockIds,
	type PlannedOperation,
	type RequestState,
	RequestTracker,
	type StepArrays,
	StepPlan,
	type TrackedRequest,
	TrackerTable,
	type TrackerTableOptions,
} from "./tracker.js";
export type { WaitOptions } from "./waiting.js";
