//! The operations, by LMCache's integer ids and by name.

/// The releases of LMCache that number their operations alike; frames and results are the same in
/// all of them. kvferry's server speaks [`Dialect::Current`].
///
/// A server does not say its release, and answers what it does not know with silence. This much
/// tells them apart, and asks none of them for anything that changes it:
///
/// | asked, without parameters | 0.4.7 | 0.5.0 to 0.5.2 | 0.5.3, 0.5.4 | since 0.5.5 |
/// | --- | --- | --- | --- | --- |
/// | 21 | nothing | `noop`: "OK" | `get_chunk_size`: an integer | the same |
/// | 17, if 21 is not answered | `get_chunk_size`: an integer | nothing | nothing | nothing |
/// | 32 | nothing | nothing | nothing | `get_experimental`: names |
///
/// "Nothing" is what an operation with parameters is answered that comes without them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Dialect {
    /// LMCache 0.5.5 and 0.5.6, and kvferry.
    #[default]
    Current,
    /// LMCache 0.5.3 and 0.5.4: the current ids, but for `get_experimental`.
    Lmcache053,
    /// LMCache 0.5.0 to 0.5.2.
    Lmcache050,
    /// LMCache 0.4.7.
    Lmcache047,
}

impl Dialect {
    /// All dialects, the newest first.
    pub const ALL: [Self; 4] =
        [Self::Current, Self::Lmcache053, Self::Lmcache050, Self::Lmcache047];
    /// The releases, for a message.
    pub const RELEASES: &'static str = "LMCache 0.4.7 and 0.5.0 to 0.5.6";

    /// The releases that speak it, for a message.
    #[must_use]
    pub const fn releases(self) -> &'static str {
        match self {
            Self::Current => "LMCache 0.5.5 or 0.5.6",
            Self::Lmcache053 => "LMCache 0.5.3 or 0.5.4",
            Self::Lmcache050 => "LMCache 0.5.0 to 0.5.2",
            Self::Lmcache047 => "LMCache 0.4.7",
        }
    }

    /// How many leases a lookup takes on each object that `readers` workers are going to read, told
    /// of them in the key's `num_kv_readers` and in `tp_size` alike.
    ///
    /// Since 0.5.5 that many. Before, servers knew `tp_size` only and inferred: above the KV world
    /// size it meant MLA, with `tp_size` readers, else one reader. So MLA with as many pipeline
    /// stages as tensor-parallel ranks, or more, got a single lease, which the first reader ends
    /// while others may still copy.
    #[must_use]
    pub const fn leases(self, readers: u32, world_size: u32) -> u32 {
        match self {
            Self::Current => readers,
            _ if readers > world_size => readers,
            _ => 1,
        }
    }
}

/// What a message asks for. Operations whose name begins with `kvferry.` have no id, and are sent
/// only to a server whose `get_experimental` reply holds [`EXTENSION`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Registers an engine's memory, for the server to copy from and to by itself (`lmcache_driven`).
    RegisterKvCache,
    /// Forgets such memory.
    UnregisterKvCache,
    /// Copies blocks out of such memory.
    Store,
    /// Copies blocks into such memory.
    Retrieve,
    /// Hashes a prompt, counts the leading chunks that are there, and leases them.
    Lookup,
    /// The count of a lookup, once; nothing while it runs.
    QueryPrefetchStatus,
    /// The count of a lookup, waited for.
    WaitPrefetchStatus,
    /// Gives back leases of a lookup.
    FreeLookupLocks,
    /// The end of a request.
    EndSession,
    /// Registers an engine's layout (`register_kv_cache_engine_driven_context`).
    Register,
    /// Forgets an engine (`unregister_kv_cache_engine_driven_context`).
    Unregister,
    /// Reserves slots to write.
    PrepareStore,
    /// Makes written slots visible.
    CommitStore,
    /// Names slots to read.
    PrepareRetrieve,
    /// Ends a read.
    CommitRetrieve,
    /// Empties the cache.
    Clear,
    /// Tokens of a chunk.
    GetChunkSize,
    /// A sign of life.
    Ping,
    /// vLLM's block allocations, for observers.
    ReportBlockAllocation,
    /// Answered by "OK".
    Noop,
    /// Names of what the server can beside the table.
    GetExperimental,
    /// A stream of what became visible and what went of one model. Sent only to a server whose `get_experimental` reply
    /// holds [`KV_EVENT_STREAM`].
    SubscribeKvEvents,
    /// kvferry: boot token, version and process of the server; replies to a connection that asked
    /// carry generations from then on.
    Hello,
    /// kvferry: gives back what `prepare_store` reserved.
    AbandonStore,
    /// kvferry: whether slots still hold the generations that were granted.
    Confirm,
    /// kvferry: drops objects whose bytes are not what was stored.
    Discard,
    /// kvferry: the checksums of what was written, before its commit. Sent only to a server whose
    /// `get_experimental` reply holds this operation's name.
    Checksums,
    /// kvferry: this connection takes and gives the bytes of slots in frames, as it has not mapped the pool. Sent only to
    /// a server whose `get_experimental` reply holds this operation's name, as the next two.
    Frames,
    /// kvferry: a piece of what is written to a slot.
    Write,
    /// kvferry: a piece of what a slot holds.
    Read,
    /// kvferry: the server's counters.
    Status,
    /// kvferry: what became visible and what went.
    Events,
    /// kvferry: why a prompt is no hit.
    Explain,
}

/// The name in a `get_experimental` reply that announces the `kvferry.` operations; one that came later is
/// announced by its own name beside it.
pub const EXTENSION: &str = "kvferry.v1";
/// The name in a `get_experimental` reply that announces `subscribe_kv_events`.
pub const KV_EVENT_STREAM: &str = "kv_event_stream";

impl Operation {
    /// All operations, in the order of their ids.
    pub const ALL: [Self; 33] = [
        Self::RegisterKvCache,
        Self::UnregisterKvCache,
        Self::Store,
        Self::Retrieve,
        Self::Lookup,
        Self::QueryPrefetchStatus,
        Self::WaitPrefetchStatus,
        Self::FreeLookupLocks,
        Self::EndSession,
        Self::Register,
        Self::Unregister,
        Self::PrepareStore,
        Self::CommitStore,
        Self::PrepareRetrieve,
        Self::CommitRetrieve,
        Self::Clear,
        Self::GetChunkSize,
        Self::Ping,
        Self::ReportBlockAllocation,
        Self::Noop,
        Self::GetExperimental,
        Self::SubscribeKvEvents,
        Self::Hello,
        Self::AbandonStore,
        Self::Confirm,
        Self::Discard,
        Self::Checksums,
        Self::Frames,
        Self::Write,
        Self::Read,
        Self::Status,
        Self::Events,
        Self::Explain,
    ];

    /// LMCache's integer for the operation; `None` for those that are sent by name only, and for
    /// those that the dialect lacks or that are of no use in it.
    #[must_use]
    pub const fn id(self, dialect: Dialect) -> Option<u64> {
        // In the order of the dialects; 0 is none.
        let ids: [u64; 4] = match self {
            // Older servers number them otherwise; no client of ours asks for them.
            Self::RegisterKvCache => [1, 1, 0, 0],
            Self::UnregisterKvCache => [2, 2, 0, 0],
            Self::Store => [6, 6, 0, 0],
            Self::Retrieve => [7, 7, 0, 0],
            Self::Lookup => [8, 8, 5, 5],
            Self::QueryPrefetchStatus => [9, 9, 6, 6],
            Self::WaitPrefetchStatus => [10, 10, 7, 0],
            Self::FreeLookupLocks => [12, 12, 9, 8],
            Self::EndSession => [13, 13, 10, 9],
            Self::Register => [14, 14, 11, 10],
            Self::Unregister => [15, 15, 12, 11],
            Self::PrepareStore => [16, 16, 13, 12],
            Self::CommitStore => [17, 17, 14, 13],
            Self::PrepareRetrieve => [18, 18, 15, 14],
            Self::CommitRetrieve => [19, 19, 16, 15],
            Self::Clear => [20, 20, 17, 16],
            Self::GetChunkSize => [21, 21, 18, 17],
            Self::Ping => [22, 22, 19, 18],
            Self::ReportBlockAllocation => [23, 23, 20, 19],
            Self::Noop => [24, 24, 21, 20],
            Self::GetExperimental => [32, 40, 0, 0],
            Self::SubscribeKvEvents
            | Self::Hello
            | Self::AbandonStore
            | Self::Confirm
            | Self::Discard
            | Self::Checksums
            | Self::Frames
            | Self::Write
            | Self::Read
            | Self::Status
            | Self::Events
            | Self::Explain => [0; 4],
        };
        match ids[dialect as usize] {
            0 => None,
            id => Some(id),
        }
    }

    /// The operation's name, as it may stand in a message instead of the id.
    pub const fn name(self) -> &'static str {
        match self {
            Self::RegisterKvCache => "register_kv_cache",
            Self::UnregisterKvCache => "unregister_kv_cache",
            Self::Store => "store",
            Self::Retrieve => "retrieve",
            Self::Lookup => "lookup",
            Self::QueryPrefetchStatus => "query_prefetch_status",
            Self::WaitPrefetchStatus => "wait_prefetch_status",
            Self::FreeLookupLocks => "free_lookup_locks",
            Self::EndSession => "end_session",
            Self::Register => "register_kv_cache_engine_driven_context",
            Self::Unregister => "unregister_kv_cache_engine_driven_context",
            Self::PrepareStore => "prepare_store",
            Self::CommitStore => "commit_store",
            Self::PrepareRetrieve => "prepare_retrieve",
            Self::CommitRetrieve => "commit_retrieve",
            Self::Clear => "clear",
            Self::GetChunkSize => "get_chunk_size",
            Self::Ping => "ping",
            Self::ReportBlockAllocation => "report_block_allocation",
            Self::Noop => "noop",
            Self::GetExperimental => "get_experimental",
            Self::SubscribeKvEvents => "subscribe_kv_events",
            Self::Hello => "kvferry.hello",
            Self::AbandonStore => "kvferry.abandon_store",
            Self::Confirm => "kvferry.confirm",
            Self::Discard => "kvferry.discard",
            Self::Checksums => "kvferry.checksums",
            Self::Frames => "kvferry.frames",
            Self::Write => "kvferry.write",
            Self::Read => "kvferry.read",
            Self::Status => "kvferry.status",
            Self::Events => "kvferry.events",
            Self::Explain => "kvferry.explain",
        }
    }

    /// The operation of this id.
    pub fn from_id(id: u64, dialect: Dialect) -> Option<Self> {
        Self::ALL.into_iter().find(|operation| operation.id(dialect) == Some(id))
    }

    /// The operation of this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|operation| operation.name() == name)
    }
}

impl std::fmt::Display for Operation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_means_one_operation_in_each_dialect() {
        for dialect in Dialect::ALL {
            for operation in Operation::ALL {
                if let Some(id) = operation.id(dialect) {
                    assert_eq!(
                        Operation::from_id(id, dialect),
                        Some(operation),
                        "{dialect:?} {id}"
                    );
                }
            }
        }
    }

    #[test]
    fn older_servers_lease_for_several_readers_only_where_they_infer_them() {
        for dialect in Dialect::ALL {
            assert_eq!(dialect.leases(1, 1), 1);
            assert_eq!(dialect.leases(1, 8), 1);
            assert_eq!(dialect.leases(4, 1), 4);
            assert_eq!(dialect.leases(4, 2), 4);
        }
        assert_eq!(Dialect::Current.leases(2, 2), 2);
        assert_eq!(Dialect::Lmcache053.leases(2, 2), 1);
        assert_eq!(Dialect::Lmcache047.leases(2, 4), 1);
    }
}
