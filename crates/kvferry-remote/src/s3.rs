//! Whatever speaks S3.

use std::pin::pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _};
use kvferry_core::{Error, Result};
use kvferry_store::remote::{Lengths, Objects, RemoteFuture};
use opendal::{ErrorKind, HttpTransporter, OperationContext, Operator, services};
use opendal_http_transport_reqwest::ReqwestTransport;

use crate::address::Bucket;
use crate::failure;

/// How long connecting may take. What waits for it has a deadline of its own.
const CONNECT: Duration = Duration::from_secs(1);
const CREDENTIALS: &str = "give what may use the bucket: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the \
                           environment, a profile, or the machine's role";
/// Where the URL and the environment name none.
const REGION: &str = "us-east-1";
/// Requests of the first round of a question, and how many times as many there are in each further one: S3 takes money
/// for each, and most that is missing is missing from the first chunk on.
const FIRST: usize = 4;
const GROWTH: usize = 4;
const MOST: usize = 64;

pub(crate) struct S3 {
    operator: Operator,
    place: String,
}

impl S3 {
    pub(crate) fn new(bucket: &Bucket, place: String) -> Result<Self> {
        let named =
            || ["AWS_REGION", "AWS_DEFAULT_REGION"].iter().find_map(|it| std::env::var(it).ok());
        let region = bucket.region.clone().or_else(named).unwrap_or_else(|| REGION.to_owned());
        let mut service = services::S3::default().bucket(&bucket.name).region(&region);
        if let Some(endpoint) = &bucket.endpoint {
            service = service.endpoint(endpoint);
        }
        let wrong =
            |reason: &str| Error::invalid(format!("the remote {place:?} cannot be used: {reason}"));
        let operator = Operator::new(service).map_err(|error| wrong(error.kind().into_static()))?;
        let client = reqwest::Client::builder().connect_timeout(CONNECT).build();
        let client = client.map_err(|error| wrong(&error.to_string()))?;
        let transport = HttpTransporter::new(ReqwestTransport::new(client));
        let operator =
            operator.with_context(OperationContext::new().with_http_transport(transport));
        Ok(Self { operator, place })
    }

    fn failure(&self, error: &opendal::Error) -> Error {
        let passing = error.is_temporary()
            || matches!(error.kind(), ErrorKind::Unexpected | ErrorKind::RateLimited);
        let reason = error.to_string();
        let is_refused = error.kind() == ErrorKind::PermissionDenied;
        let remedy = (is_refused || reason.contains("credential")).then_some(CREDENTIALS);
        failure(&self.place, passing, &reason, remedy)
    }

    async fn length(&self, key: &str) -> Result<Option<u64>> {
        match self.operator.stat(key).await {
            Ok(known) => Ok(Some(known.content_length())),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(self.failure(&error)),
        }
    }
}

impl Objects for S3 {
    fn lengths<'a>(&'a self, keys: Vec<String>, told: &'a Lengths) -> RemoteFuture<'a, ()> {
        Box::pin(async move {
            let (mut from, mut count) = (0, FIRST);
            while from < keys.len() {
                let some = &keys[from..keys.len().min(from + count)];
                let ask = |key: String| async move { self.length(&key).await };
                let mut asked = pin!(stream::iter(some.to_vec()).map(ask).buffered(MOST));
                while let Some(length) = asked.next().await {
                    match length? {
                        Some(length) => told.tell(length),
                        None => return Ok(()),
                    }
                }
                from += some.len();
                count *= GROWTH;
            }
            Ok(())
        })
    }

    fn get(&self, key: String) -> RemoteFuture<'_, Option<Bytes>> {
        Box::pin(async move {
            match self.operator.read(&key).await {
                Ok(value) => Ok(Some(value.to_bytes())),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
                Err(error) => Err(self.failure(&error)),
            }
        })
    }

    fn put(&self, key: String, value: Bytes) -> RemoteFuture<'_, ()> {
        Box::pin(async move {
            self.operator.write(&key, value).await.map(drop).map_err(|error| self.failure(&error))
        })
    }

    fn put_new(&self, key: String, value: Bytes) -> RemoteFuture<'_, bool> {
        Box::pin(async move {
            let put = self.operator.write_with(&key, value.clone()).if_not_exists(true);
            match put.await {
                Ok(_) => Ok(true),
                Err(error) if error.kind() == ErrorKind::ConditionNotMatch => Ok(false),
                Err(error) if error.is_temporary() => Err(self.failure(&error)),
                // Not every store knows the condition.
                Err(_) => self.put(key, value).await.map(|()| true),
            }
        })
    }

    fn remove(&self, key: String) -> RemoteFuture<'_, ()> {
        Box::pin(
            async move { self.operator.delete(&key).await.map_err(|error| self.failure(&error)) },
        )
    }

    fn place(&self) -> &str {
        &self.place
    }
}
