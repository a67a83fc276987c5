use std::{fmt, str::FromStr, sync::Arc};

/// Namespace and name of an object; orders and prints as `namespace/name`, or as `name` where the namespace is empty,
/// as it is for cluster-wide kinds.
///
/// Cheap to clone: the builder and what is downstream of it keep each name many times.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct NamespacedName {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl NamespacedName {
    pub fn new(namespace: impl Into<Arc<str>>, name: impl Into<Arc<str>>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.namespace {
            "" => f.write_str(&self.name),
            namespace => write!(f, "{namespace}/{}", self.name),
        }
    }
}

/// A text that is not `namespace/name`.
#[derive(Debug, thiserror::Error)]
#[error("'{0}' is not of the form NAMESPACE/NAME")]
pub struct ParseNameError(String);

impl FromStr for NamespacedName {
    type Err = ParseNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                Ok(Self::new(namespace, name))
            }
            _ => Err(ParseNameError(text.to_owned())),
        }
    }
}
